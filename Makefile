# make demo    text -> shards -> a small model -> its score, in a few minutes on a CPU
# make test    the whole test suite; JOBS=4 runs four files of tests at once, on a machine that can
# make check   ruff and mypy
# make golden VERSION=v0.2   tests/data/v0.2: what this version writes, for every later one to read
# make mutants does a test notice each small change to the numerics? A sample, a quarter of an hour
# make soak    a run killed a hundred times, compared with one that was not; ten minutes
#
# The environment lives in .venv; PYTHON names the interpreter that makes it (3.11 or later).
# A torch >= 2.9 that this interpreter already has is kept, never replaced.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INPUTS = pyproject.toml constraints.txt tools/environment.py

.PHONY: demo test check mutants golden soak clean
demo: $(VENV)/.demo
	$(RUN) -m tools.demo

test: $(VENV)/.dev
	$(RUN) -m pytest $(if $(JOBS),-n $(JOBS) --dist loadfile)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

golden: $(VENV)/.dev
	@test -n "$(VERSION)" || { echo "error: name the version, as in make golden VERSION=v0.2"; exit 2; }
	$(RUN) tests/make_golden.py tests/data/$(VERSION)

mutants: $(VENV)/.dev
	$(RUN) tests/mutants.py

soak: $(VENV)/.dev
	SUMMER_SOAK_KILLS=100 $(RUN) -m pytest -s tests/test_tools_rehearsal.py -k random_moments

clean:
	rm -rf $(VENV) demo

$(VENV)/.demo: $(INPUTS)
	@$(PYTHON) tools/environment.py $(VENV)
	@touch $@

$(VENV)/.dev: $(INPUTS)
	@$(PYTHON) tools/environment.py $(VENV) dev
	@touch $@ $(VENV)/.demo
