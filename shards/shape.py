"""Whether a JSON value is what a format says it is: of a shape, or the fields of a dataclass."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def check_shape(value: object, shape: object, name: str = "it") -> None:
    """ValueError, naming the place, where a JSON value has not the shape.

    A shape is a type (float takes whole numbers too, and neither NaN nor infinity), a list of the
    one shape of all items, a tuple of one for each, a set of alternatives, or a dict: of a shape
    for each key that may be there, or under "*" of the one shape of all values. Whole numbers are
    not negative and fit 8 bytes.
    """
    if isinstance(shape, frozenset):
        if not any(_has_shape(value, one) for one in shape):
            raise _wrong(name, value)
    elif isinstance(shape, (list, tuple)):
        n = len(value) if isinstance(value, list) else -1
        shapes = shape * n if isinstance(shape, list) else shape
        if n != len(shapes):
            raise _wrong(name, value)
        for i, (item, one) in enumerate(zip(value, shapes, strict=True)):  # type: ignore[call-overload]
            check_shape(item, one, f"{name}[{i}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise _wrong(name, value)
        for key, item in value.items():
            if (one := shape.get(key, shape.get("*"))) is not None:
                check_shape(item, one, f"{name}.{key}")
    elif not _is(value, shape):
        raise _wrong(name, value)


def build(cls: type[T], value: object) -> T:
    """A dataclass from the fields of the same names in a JSON object; other keys are left alone.

    Dataclasses, tuples and mappings in it are built, too; whole numbers are not negative. A field
    with a default may be absent: a later version has added it. ValueError says `.NAME is VALUE`.
    """
    if not isinstance(value, dict):
        raise _wrong("", value)
    given = {}
    for name, needed, make in _fields_of(cls):  # type: ignore[arg-type]
        if name in value:
            try:
                given[name] = make(value[name])
            except ValueError as error:
                raise ValueError(f".{name}{error}") from error
        elif needed:
            raise ValueError(f".{name} is missing")
    return cls(**given)


@functools.cache
def _fields_of(cls: Any) -> tuple[tuple[str, bool, Callable[[Any], Any]], ...]:
    """Of each field its name, whether it must be there, and what makes its value."""
    kinds = get_type_hints(cls)
    return tuple(
        (each.name, each.default is each.default_factory is MISSING, _maker(kinds[each.name]))
        for each in fields(cls)
    )


def _maker(kind: Any) -> Callable[[Any], Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return lambda value: build(kind, value)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        of_first = _maker(inner[0])  # the other is None
        return lambda value: None if value is None else of_first(value)
    if origin is tuple:
        of_one = _maker(inner[0])
        return lambda value: tuple(map(of_one, _checked(value, list)))
    if origin is Mapping:
        of_value = _maker(inner[1])
        return lambda value: {k: of_value(v) for k, v in _checked(value, dict).items()}
    if origin is Literal:
        return functools.partial(_one_of, inner)
    return (lambda value: value) if kind is Any else functools.partial(_checked, kind=kind)


def _checked(value: Any, kind: type) -> Any:
    if not _is(value, kind):
        raise _wrong("", value)
    return value


def _one_of(allowed: tuple[object, ...], value: Any) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise _wrong("", value)
    return value


def _has_shape(value: object, shape: object) -> bool:
    with contextlib.suppress(ValueError):
        check_shape(value, shape)
        return True
    return False


def _is(value: object, kind: object) -> bool:
    if kind is float and type(value) in (int, float):
        return math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is kind and (kind is not int or 0 <= value < 1 << 63)  # type: ignore[operator]


def _wrong(name: str, value: object) -> ValueError:
    text = repr(value)
    return ValueError(f"{name} is {text if len(text) < 60 else f'{text[:57]}...'}")
