"""What every command of the tools has: -h, --version, an example, failures in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from model.config import ModelError
from shards.errors import one_line_failures
from shards.versions import VERSION

Function = Callable[..., Any]
FOLDER: Final = click.Path(path_type=Path)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto",
    help="Where to compute.  [default: an accelerator, if there is one]",
)  # fmt: skip
_OF_MODELS: Final = (
    click.option("--run", type=FOLDER, help="A run, at its newest checkpoint.  [default: newest]"),
    click.option("--checkpoint", type=FOLDER, help="One checkpoint: runs/NAME/checkpoints/step-N."),
    click.option("--hf", type=FOLDER, help="A Llama-family folder (safetensors, tokenizer)."),
    click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto",
                 help="Arithmetic.  [default: bf16 on a GPU, else fp32]"),
    device_option,
)  # fmt: skip


class Destination(click.Path):
    """A file to write, of one of these kinds (none: any); that it can be is checked first."""

    def __init__(self, *kinds: str) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)
        self._kinds = kinds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; a usage error where its kind is another, or its folder takes no file."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self._kinds and path.suffix not in self._kinds:
            self.fail(f"{path}: name a {' or a '.join(self._kinds)} file", param, ctx)
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            self.fail(f"{path}: {path.parent} is no folder that can be written to", param, ctx)
        return path


def command(example: str) -> Callable[[Function], click.Command]:
    """Make a command of a function; what a user can fix becomes one line and exit code 1."""
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    make = click.command(epilog=f"Example: {example}", context_settings=settings)
    with_version = click.version_option(VERSION, prog_name="summerlm")
    return lambda function: make(with_version(one_line_failures(ModelError)(function)))


def model_options(function: Function) -> Function:
    """The options that choose a model, and where and how precisely it computes."""
    for option in reversed(_OF_MODELS):
        function = option(function)
    return function
