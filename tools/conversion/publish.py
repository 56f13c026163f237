"""A folder that was checked -> the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from shards.errors import one_line
from tools.errors import ConversionError

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
