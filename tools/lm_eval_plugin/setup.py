"""The one thing that pyproject.toml cannot say: a .pth file goes beside the module."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithHook(build_py):
    """Copies the line that Python reads at its start."""

    def run(self) -> None:
        """Build the module, then add the line."""
        super().run()
        self.copy_file("summerlm_lm_eval.pth", self.build_lib)


setup(cmdclass={"build_py": BuildWithHook})
