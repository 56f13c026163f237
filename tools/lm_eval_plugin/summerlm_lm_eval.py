"""lm-evaluation-harness knows `summerlm` by name: `lm_eval --model summerlm --model_args run=RUN`.

    pip install tools/lm_eval_plugin          pip uninstall summerlm-lm-eval

The harness (0.4.13) has a table of its own models, and neither entry points nor an option for more.
So the .pth file beside this module lets every start of this environment's Python listen for the
import of that table: 0.3 ms, and nothing else happens until somebody asks the harness for
`summerlm`; then tools.evaluation.lm_eval_model is imported. That is why it is a package of its
own, put in by those who want it, and why it imports nothing at its start.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own takes 2 ms to import, at every start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLE = "lm_eval.models"
NAME = "summerlm"
TARGET = "tools.evaluation.lm_eval_model:SummerLM"


class TableFinder:
    """Finds the harness' table where the finders behind it do, and adds one line to it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The table's module, which registers our model after itself; None for any other."""
        if name != TABLE:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in behind)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            fill = spec.loader.exec_module

            def fill_and_register(module: ModuleType) -> None:
                fill(module)
                register()

            spec.loader.exec_module = fill_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Name our model in the harness' registry, unless our module has done so itself.

    A registry of another kind costs a warning, not the harness.
    """
    try:
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
    except Exception as error:
        import warnings

        warnings.warn(f"this lm_eval does not take {NAME} by name: {error}", stacklevel=2)


def install() -> None:
    """Listen from now on; once, although Python may read a folder's .pth files several times."""
    if not any(isinstance(finder, TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TableFinder())
