"""Every key of a run: defaults < one preset < `--set section.key=value`.

    config, explicit = configure(preset="tiny", sets=["max_steps=40", "optim.lr=1e-3"])

A section is the configuration of one part (sections.py, schedule.py); `RunConfig` nests them. A
preset is a TOML file with the same names, as is `--config FILE`. A table of sources (`mixture`,
`max_epochs`) in a preset replaces the default; `--set mixture.pg19=5` changes one entry.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from model.config import ModelConfig, ModelError
from shards.files import publish_json, read_json
from shards.versions import FORMAT_KEY, RUN, STAMP, check_format, check_keys, stamp, writer_of
from trainer.checkpoint.runs import CONFIG, newest_run, runs_by_age
from trainer.config.deadline import parse_duration
from trainer.config.sections import (
    CheckpointConfig,
    GuardConfig,
    LoaderConfig,
    ValidationConfig,
    parse_steps,
)
from trainer.config.shares import REFERENCE_SHARES
from trainer.errors import ConfigError, at_least, did_you_mean
from trainer.optimizer.schedule import OptimConfig

T = TypeVar("T")

PRESETS: Final = Path(__file__).with_name("presets")
REFERENCE: Final = "summer-4b"

_BESIDE: Final = "shards_from_run"
"""Key of config.json: the way from the run's folder to the shards."""

MEANT_BEFORE: Final[dict[str, Any]] = {}
"""What a stored configuration without a key means, where that is not the key's default.

A new key whose default changes what a run computes needs an entry: `"model.qk_norm": False` for
a default of True, so that stored runs and exports stay the models that they were.
"""

SPELLED_BEFORE: Final[dict[tuple[str, object], Any]] = {
    ("deterministic", True): "auto",  # 0.2.0 and before: as far as the device can
    ("deterministic", False): "false",
}
"""(Key, stored value) -> how that value is spelled today."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What one run does. The defaults are those of the reference run."""

    preset: str = REFERENCE
    shards: str = "shards"
    init_from: str = ""  # a run (or "newest") whose weights and model this run starts from
    seed: int = 0
    max_steps: int = 80_000
    global_batch_tokens: int = 1_048_576  # a step; rows = this / seq_len
    micro_batch_size: int | None = None  # rows per device per forward; None: the most that fit
    precision: Literal["bf16", "fp32"] = "bf16"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    shard_degree: int = 1  # ranks that hold one copy of weights and moments; 1: each holds all
    compile: bool = True
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    deterministic: Literal["auto", "true", "false"] = "auto"  # same bits twice; true: or none
    log_interval: int = 10
    tensorboard: bool = True
    dollars_per_hour: float = 0.0  # of all devices together; 0: nothing is said about money
    max_dollars: float = 0.0  # anneal in time to checkpoint inside this budget; 0: there is none
    stop_after: str = ""  # "23h50m" after the start: checkpoint and end with 75, as SIGTERM does
    profile_steps: str = ""  # "10" or "10-12": these steps are profiled into the run's folder
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    mixture: dict[str, float] = field(default_factory=lambda: dict(REFERENCE_SHARES))
    max_epochs: dict[str, float] = field(default_factory=dict)  # of a source; more is an error

    def __post_init__(self) -> None:
        at_least("", self, max_steps=1, global_batch_tokens=1, log_interval=1, shard_degree=1)
        at_least("", self, dollars_per_hour=0, max_dollars=0, seed=0)
        if self.max_dollars and not self.dollars_per_hour:
            raise ConfigError(
                f"max_dollars={self.max_dollars}: give the price too, --set dollars_per_hour="
            )
        parse_steps(self.profile_steps)
        parse_duration(self.stop_after)
        if self.micro_batch_size is not None:
            at_least("", self, micro_batch_size=1)


class Configured(NamedTuple):
    """A configuration, and the keys that `--set` gave: those are never bent to fit data or CPU."""

    config: RunConfig
    explicit: frozenset[str]


def presets() -> list[str]:
    """The names of the presets that come with the trainer."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def configure(
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Iterable[str] = (),
    shards: str | None = None,
) -> Configured:
    """The configuration of a run; ConfigError for a wrong key (with the nearest) or value."""
    if file is not None and preset is not None:
        raise ConfigError(f"--preset {preset} and --config {file}: give one of them")
    changes = [_parse_set(text) for text in sets]
    explicit = frozenset(".".join(path) for path, _ in changes)
    if preset is not None and preset not in presets():
        near = did_you_mean(preset, presets())
        raise ConfigError(f"no preset {preset!r}; {near}there are: {', '.join(presets())}")
    table = _read_toml(file or PRESETS / f"{preset or REFERENCE}.toml")
    explicit |= table.keys() & {"precision"}  # a file's own choice is meant
    table = {"preset": file.stem if file else preset or REFERENCE, **table}
    if shards is not None:
        table["shards"] = str(Path(shards).absolute())  # a run may be gone on with from elsewhere
    init_from = next((v for path, v in changes if path == ("init_from",)), table.get("init_from"))
    if init_from:
        table |= _started_from(str(init_from))
        changes = [change for change in changes if change[0] != ("init_from",)]
    for path, value in changes:
        _assign(table, path, value)
    return Configured(_build(RunConfig, table), explicit)


def load_config(run: Path) -> RunConfig:
    """The resolved configuration of a run, from its config.json."""
    path = run / CONFIG
    try:
        table = {FORMAT_KEY: RUN, **read_json(path)}  # 0.1.0 did not name it
    except FileNotFoundError:
        raise ConfigError(f"{run}: no {CONFIG} there, so it is no run of summer-train") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}; restore it, or start a new run with --out") from error
    check_format(table, RUN, path)
    bare = {key: value for key, value in table.items() if key not in (*STAMP, _BESIDE)}
    try:
        config = from_stored(RunConfig, bare, path, writer_of(table))
        shards = Path(config.shards).absolute()  # earlier versions wrote it as it was typed
        moved = (run / str(table.get(_BESIDE, ""))).resolve()
        if _BESIDE in table and moved.is_dir() and not shards.exists():
            shards = moved
        return dataclasses.replace(config, shards=str(shards))
    except ConfigError as error:
        raise ConfigError(f"{error}; restore it, or start a new run with --out") from error


def earlier_run(out: Path | None, resume: str) -> Path | None:
    """The run that a start would go on with: of the checkpoint that is named, or in `out`."""
    if resume in ("auto", "never"):
        return out
    place = Path(resume)
    return place if (place / CONFIG).exists() else place.resolve().parent.parent


def shards_of(out: Path | None, resume: str) -> str:
    """The shards of the run that a start would go on with; `shards` where there is none."""
    run = earlier_run(out, resume)
    return load_config(run).shards if run and (run / CONFIG).exists() else "shards"


def save_config(run: Path, config: RunConfig) -> None:
    """Write a run's config.json; both were moved if the shards are elsewhere when it is read."""
    beside = {_BESIDE: os.path.relpath(config.shards, run)}
    publish_json(run / CONFIG, {**stamp(RUN), **asdict(config), **beside})


def from_stored(
    cls: type[T], table: Mapping[str, Any], where: object, writer: str, prefix: str = ""
) -> T:
    """An instance of a dataclass from what a file of version `writer` holds of it.

    A key that is not there means its default, or what MEANT_BEFORE says. VersionError for a key
    that this version does not know; ConfigError for a value that does not fit its key, or a key
    that is missing and has no default. `prefix` is that of the keys' dotted names.
    """
    check_keys(_unknown_keys(cls, table, prefix), (), where, writer)
    full: dict[str, Any] = copy.deepcopy(dict(table))
    for (name, old), new in SPELLED_BEFORE.items():
        if not prefix and full.get(name) is old:
            full[name] = new
    for name, value in MEANT_BEFORE.items():
        if name.startswith(prefix):
            section, _, key = name.removeprefix(prefix).rpartition(".")
            inner = full.setdefault(section, {}) if section else full
            if isinstance(inner, dict):  # anything else is rejected below
                inner.setdefault(key, value)
    try:
        made: T = _build(cls, full, prefix)
    except ConfigError as error:
        raise ConfigError(f"{where}, written by SummerLM {writer}: {error}") from error
    return made


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[object, object]]:
    """Dotted keys in which two configurations differ, with both values."""
    before, after = dict(flatten(asdict(old))), dict(flatten(asdict(new)))
    pairs = {key: (before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])}
    return {key: (was, now) for key, (was, now) in pairs.items() if was != now}


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def spell_value(value: object) -> str:
    """The value as `--set` takes it."""
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid TOML ({error})") from error


def _parse_set(text: str) -> tuple[tuple[str, ...], Any]:
    """The key's path and the value of `section.key=value`; a value that is no TOML is a text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: write it as section.key=value")
    try:
        return tuple(key.strip().split(".")), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return tuple(key.strip().split(".")), value.strip()


def _assign(table: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *sections, key = path
    for section in sections:
        if section == "mixture" and section not in table:
            table[section] = dict(REFERENCE_SHARES)
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{'.'.join(path)}: {section} is a key, not a section")
    table[key] = value


def _started_from(name: str) -> dict[str, Any]:
    run = Path(name)
    if name == "newest":  # that was not itself started from another, as this one will be
        bases = (run for run in runs_by_age() if not load_config(run).init_from)
        run = next(bases, None) or newest_run()
    return {"init_from": str(run), "model": asdict(load_config(run).model)}


def _unknown_keys(cls: type[Any], table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The dotted keys of a table that no field of a configuration dataclass has."""
    hints = typing.get_type_hints(cls)
    for key, value in table.items():
        if key not in hints:
            yield f"{prefix}{key}"
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            yield from _unknown_keys(hints[key], value, f"{prefix}{key}.")


def _build(cls: type[Any], table: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of a configuration dataclass from a table of the same names."""
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            mean = _nearest(f"{prefix}{key}", [f"{prefix}{name}" for name in hints])
            raise ConfigError(
                f"unknown key {prefix}{key}; {mean or 'there are: ' + ', '.join(hints)}"
            )
    for field_ in dataclasses.fields(cls):
        if field_.name not in table and field_.default is field_.default_factory is MISSING:
            raise ConfigError(f"{prefix}{field_.name} is missing")
    try:
        return cls(**{k: _fit(f"{prefix}{k}", v, hints[k]) for k, v in table.items()})
    except ModelError as error:
        raise ConfigError(str(error)) from error


def _fit(name: str, value: Any, hint: Any) -> Any:
    """The value as the type that the key wants; ConfigError if it is of another."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None or value in ("none", "auto"):
            return None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(typing.cast("type[Any]", hint), value, f"{name}.")
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        return {key: _fit(f"{name}.{key}", entry, float) for key, entry in value.items()}
    if typing.get_origin(hint) is Literal:
        value = str(value).lower() if isinstance(value, bool) else value  # `true` is a bool in TOML
        if value in typing.get_args(hint):
            return value
        raise ConfigError(f"{name}={value}: must be one of {', '.join(typing.get_args(hint))}")
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)  # 1e6 is how people write a million
    if type(value) is hint and value == value and value not in _INFINITE:
        return value
    kind = "a table" if dataclasses.is_dataclass(hint) or not isinstance(hint, type) else None
    raise ConfigError(f"{name}={value!r}: must be {kind or _KINDS[hint]}")


_INFINITE: Final = (math.inf, -math.inf)
_KINDS: Final = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _nearest(name: str, names: list[str]) -> str:
    """`did you mean ...? ` for the keys most like this one, in any section, or nothing."""
    every = [*names, *(key for key, _ in flatten(asdict(RunConfig())))]
    spelled = {text: full for full in every for text in (full.rpartition(".")[2], full)}
    near = difflib.get_close_matches(name, spelled, 3, 0.75)
    near = near or difflib.get_close_matches(name.rpartition(".")[2], spelled, 3, 0.6)
    mean = " or ".join(dict.fromkeys(spelled[key] for key in near))
    return f"did you mean {mean}? " if near else ""
