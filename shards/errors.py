"""The root of the error tree, and what turns it into a one-line failure.

A message names the thing, the value and the fix, in one line.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class SummerError(Exception):
    """A failure that the user can fix; the message says how."""


class ShardError(SummerError):
    """A shard, sidecar, unit record or manifest that is missing, damaged or unknown."""


class VersionError(SummerError):
    """A file that is as it was written, by a version that knew more than this one."""


def one_line_failures(*also: type[Exception]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a command: SummerError, OSError and `also` become `error: ...` and exit code 1.

    Anything else is a bug of ours and keeps its traceback.
    """

    expected: tuple[type[Exception], ...] = (SummerError, OSError, *also)

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return command(*args, **kwargs)
            except BrokenPipeError:  # the reader of our output (head, less) has seen enough
                sys.stderr.close()
                raise SystemExit(0) from None
            except expected as error:
                print(f"error: {one_line(error)}", file=sys.stderr)
                raise SystemExit(1) from error

        return run

    return decorate


def one_line(error: BaseException) -> str:
    """What an exception says, in a line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
