"""Makes the virtual environment that `make demo` and `make test` run in.

    python3 tools/environment.py .venv          # the package alone
    python3 tools/environment.py .venv dev      # with its extra `dev`

Needs nothing but Python >= 3.11. A torch >= 2.9 that this Python already has is used as it is and
pinned to its own version, because a ROCm or CUDA build must never be replaced by the generic one;
otherwise the version in constraints.txt is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 9)


def main(folder: str, extras: str) -> None:
    """Create the environment if it is not there and install the package with these extras."""
    if sys.version_info < (3, 11):  # noqa: UP036  (whatever Python the user has comes this way)
        sys.exit(f"error: Python {sys.version.split()[0]} is too old; run make PYTHON=python3.11")
    environment = Path(folder).resolve()
    python = environment / "bin" / "python"
    torch = installed_torch()
    if not python.exists():
        print(f"making {environment.name} with Python {sys.version.split()[0]}", flush=True)
        venv.create(environment, with_pip=True)
        if torch:
            reuse_packages(environment)
    constraints = environment / "constraints.txt"
    constraints.write_text(constraints_for(torch))
    if torch:
        print(f"keeping torch {torch} of this machine", flush=True)
    print("installing (a few minutes the first time)", flush=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    package = f"{HERE}[{extras}]" if extras else str(HERE)
    install = [*pip, "install", "-c", str(constraints), "-e", package]
    if subprocess.run(install, check=False).returncode != 0:
        sys.exit("error: pip could not install the packages; its message above says which")


def installed_torch() -> str | None:
    """The version of a usable torch that this Python has, or None."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return version if numbers >= OLDEST_TORCH else None


def reuse_packages(environment: Path) -> None:
    """Let the environment see this Python's packages, behind its own.

    By a .pth file: `--system-site-packages` would show those of the base interpreter only, and
    torch often lives in a virtual environment itself.
    """
    ours = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=ours))
    seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "packages_of_this_machine.pth").write_text("\n".join(seen) + "\n")


def constraints_for(torch: str | None) -> str:
    """constraints.txt, with torch pinned to the version that is kept, if one is."""
    lines = (HERE / "constraints.txt").read_text().splitlines()
    if torch:
        lines = [f"torch=={torch}" if line.startswith("torch==") else line for line in lines]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the virtual environment of `make demo`.")
    parser.add_argument("folder", help="where it goes, such as .venv")
    parser.add_argument("extras", nargs="?", default="", help="extras of the package, such as dev")
    main(**vars(parser.parse_args()))
