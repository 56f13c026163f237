"""The GPU measurements' one command, in its small form on the CPU: only the script is checked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

COMMAND = REPOSITORY / "tools" / "benchmarks" / "gpu.sh"


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "--device", "cpu", "--small", "--out", out, "--golden", out / "known", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )


def losses_kept(tmp_path: Path) -> Path:
    done = run(tmp_path, "--parts", "golden")
    assert done.returncode == 0, done.stderr
    assert "**Not run on a GPU.**" in done.stdout
    (found,) = tmp_path.glob("*-small.json")
    assert f"{found.name}: new, " in (tmp_path / "golden.md").read_text()
    (tmp_path / "known").mkdir()
    return Path(shutil.copy(found, tmp_path / "known"))


def test_losses_are_compared_with_those_that_were_kept(tmp_path: Path) -> None:
    known = losses_kept(tmp_path)
    assert len(json.loads(known.read_text())["losses"]) == 20
    assert "the same bits in 20 steps" in run(tmp_path, "--parts", "golden").stdout


@pytest.mark.slow
def test_a_part_that_fails_says_so_and_the_next_goes_on(tmp_path: Path) -> None:
    known = losses_kept(tmp_path)
    found = json.loads(known.read_text())
    found["losses"][7] *= 1 + 1e-6
    known.write_text(json.dumps(found))
    assert "DIFFERENT by up to 1.0e-06" in run(tmp_path, "--parts", "golden").stdout
    known.write_text("{")
    done = run(tmp_path, "--parts", "golden", "kernels")
    assert done.returncode == 1
    assert "failed: golden" in done.stderr
    assert "**FAILED: JSONDecodeError" in (tmp_path / "golden.md").read_text()
    assert "| 96 | 0.1 | MATH |" in (tmp_path / "kernels.md").read_text()
