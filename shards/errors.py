"""The root of the error tree, and what turns it into a one-line failure.

    SummerError
      ShardError          shards/     a file that is missing, damaged or of another format
      VersionError        shards/     a file that only another version of SummerLM reads
      SourceError ...     pipeline/errors.py
      ConfigError ...     trainer/errors.py
      EvaluationError ... tools/errors.py

A message names the thing, the value and the fix, in one line.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
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
                print(f"error: {_one_line(error)}", file=sys.stderr)
                raise SystemExit(1) from error

        return run

    return decorate


def one_line_uncaught(*also: type[Exception]) -> None:
    """Show SummerError and `also` as `error: ...` where nobody catches them: in others' commands.

    They are raised as ever, and what is no failure of ours keeps its traceback.
    """
    show_others = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, (SummerError, *also)):
            print(f"error: {_one_line(error)}", file=sys.stderr)
        else:
            show_others(kind, error, trace)

    sys.excepthook = show


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())
