"""A thousand random damages: each is named with its file, and its rows where rows are hit."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checks.repair import repair
from pipeline.checks.verify import Damage, find_damage
from pipeline.errors import PrepareError
from pipeline.units.executors import Executor
from pipeline_samples import TEXTS, contents, prepared, request, write_jsonl
from shards import writer
from shards.files import json_bytes
from shards.format import TOKEN_BYTES, ShardInfo, compute_root
from shards.reader import read_manifest

Hit = tuple[str, dict[str, set[int]]]
"""What was done, and to which files; of a shard with the rows, if only rows were hit."""


class RandomDamage:
    """Damages a source at random."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.names = sorted(path.name for path in folder.iterdir())
        self.shards = [n for n in self.names if re.fullmatch(r"[\w-]+-\d+\.npy", n)]
        self.kinds: list[Callable[[], Hit]] = [
            self.flip, self.flip, self.cut, self.extend, self.remove, self.zero, self.swap_shards,
            self.swap_sidecars, self.swap_pairs, self.swap_rows, self.edit, self.edit, self.edit,
            self.edit_and_count_again, self.contradict, self.edit_rejections, self.put_more,
        ]  # fmt: skip
        if any(".mask." in name for name in self.names):
            self.kinds.append(self.flip_mask)

    def do(self) -> Hit:
        before = contents(self.folder)
        while True:
            hit = self.rng.choice(self.kinds)()
            if contents(self.folder) != before:  # not zeros over zeros
                return hit

    def any(self, names: list[str]) -> Path:
        return self.folder / self.rng.choice(names)

    def rows_at(self, name: str, first: int, last: int) -> set[int]:
        """The rows of a shard or mask that its bytes [first, last) belong to; none for others."""
        if not name[0].isdigit() or name.endswith((".rows.npy", ".json", ".jsonl")):
            return set()
        array = np.load(self.folder / name)
        start = (self.folder / name).stat().st_size - array.nbytes
        width = array.nbytes // len(array)
        at = range((first - start) // width, (last - 1 - start) // width + 1)
        return set(at) if first >= start else set()

    def flip(self, names: list[str] | None = None) -> Hit:
        path = self.any(names or self.names)
        data = bytearray(path.read_bytes())
        at = self.rng.randrange(len(data))
        rows = self.rows_at(path.name, at, at + 1)
        data[at] ^= 1 << self.rng.randrange(8)
        path.write_bytes(data)
        return "flip", {path.name: rows}

    def flip_mask(self) -> Hit:
        return self.flip([name for name in self.names if ".mask." in name])

    def cut(self) -> Hit:
        path = self.any(self.names)
        path.write_bytes(path.read_bytes()[: self.rng.randrange(path.stat().st_size)])
        return "cut", {path.name: set()}

    def extend(self) -> Hit:
        path = self.any(self.names)
        path.write_bytes(path.read_bytes() + self.rng.randbytes(self.rng.randrange(1, 9)))
        return "extend", {path.name: set()}

    def remove(self) -> Hit:
        path = self.any([name for name in self.names if name != TOKEN_BYTES])  # old: without one
        path.unlink()
        return "remove", {path.name: set()}

    def zero(self) -> Hit:
        path = self.any(self.names)
        data = bytearray(path.read_bytes())
        at = self.rng.randrange(len(data))
        data[at : at + 40] = bytes(len(data[at : at + 40]))
        path.write_bytes(data)
        return "zero", {path.name: set()}

    def swap(self, endings: list[str]) -> Hit:
        stems = [name.removesuffix(".npy") for name in self.rng.sample(self.shards, 2)]
        for ending in endings:
            one, two = (self.folder / f"{stem}{ending}" for stem in stems)
            data = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(data)
        return f"swap {endings}", {f"{stem}{endings[-1]}": set() for stem in stems}

    def swap_shards(self) -> Hit:
        return self.swap([".npy"])

    def swap_sidecars(self) -> Hit:
        return self.swap([".rows.npy"])

    def swap_pairs(self) -> Hit:
        masked = any(".mask." in name for name in self.names)
        return self.swap([".npy", *[".mask.npy"] * masked, ".rows.npy"])

    def swap_rows(self) -> Hit:
        """Two rows of a shard change places."""
        path = self.any(self.shards)
        array = np.load(path)
        rows = self.rng.sample(range(len(array)), min(2, len(array)))
        array[rows] = array[rows[::-1]]
        np.save(path, array)
        return "swap rows", {path.name: set(rows)}

    def edit(self) -> Hit:
        """One value in a JSON file is another, of the same kind or not; it stays valid JSON."""
        path = self.any([name for name in self.names if name.endswith(".json")])
        value = json.loads(path.read_text())
        place: Any = value
        while True:
            key = self.rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or self.rng.random() < 0.1:
                break
            place = place[key]
        was = place[key]
        place[key] = self.rng.choice([self.other(was), self.other(was), None, [], {}, "?", 7, -1.5])
        path.write_bytes(json_bytes(value))
        return f"edit {key}: {was!r} to {place[key]!r}", {path.name: set()}

    def other(self, value: Any) -> Any:
        """A value of the same kind that could stand there."""
        if isinstance(value, str):
            return "".join(self.rng.sample(value, len(value)))
        if isinstance(value, int | float):
            return value + self.rng.choice([1, -1, 64])
        if isinstance(value, list):
            return self.rng.choice([value[::-1], value[1:], value[:-1], [*value, *value[-1:]]])
        return dict(list(value.items())[1:]) if isinstance(value, dict) else value

    def edit_and_count_again(self) -> Hit:
        """The manifest lists something else, its counts and its root fit what it lists."""
        path = self.folder / "manifest.json"
        value = json.loads(path.read_text())
        shards = value["shards"]
        shard = self.rng.choice(shards)
        change = self.rng.choice(["n_rows", "n_tokens", "n_documents", "bytes", "file", "split",
                                "rows_sha256", "order", "drop", "double"])  # fmt: skip
        if change == "order":
            self.rng.shuffle(shards)
        elif change in ("drop", "double"):
            value["shards"] = (
                [s for s in shards if s != shard] if change == "drop" else [*shards, shard]
            )
        else:
            shard[change] = {"train": "val", "val": "train"}.get(shard[change]) or self.other(
                shard[change]
            )
        self.count_again(value)
        path.write_bytes(json_bytes(value))
        return f"count again, {change}", {path.name: set()}

    def count_again(self, value: Any) -> None:
        facts = read_manifest(self.folder).facts
        infos = [ShardInfo(**shard) for shard in value["shards"]]
        for count in ("n_rows", "n_tokens", "n_documents"):
            value[count] = sum(getattr(info, count) for info in infos)
        value["n_val_rows"] = sum(info.n_rows for info in infos if info.split == "val")
        value["root"] = compute_root(facts, infos)

    def contradict(self) -> Hit:
        """A unit record differs from the manifest, and both are valid."""
        path = self.any([name for name in self.names if name[0].isdigit() and ".json" in name[5:]
                         and name.endswith(".json")])  # fmt: skip
        value = json.loads(path.read_text())
        key = self.rng.choice(["n_rows", "n_tokens", "n_documents", "bytes", "rows_sha256"])
        shard = self.rng.choice(value["shards"])
        shard[key] = self.other(shard[key])
        path.write_bytes(json_bytes(value))
        return f"contradict, {key}", {path.name: set()}

    def edit_rejections(self) -> Hit:
        path = self.any([name for name in self.names if name.endswith(".jsonl")])
        lines = path.read_text().splitlines()
        number = self.rng.randrange(len(lines))
        entry = {**json.loads(lines[number]), "record": self.rng.randrange(100)}
        lines[number : number + 1] = self.rng.choice([[], [json.dumps(entry)], [lines[number]] * 2])
        path.write_text("".join(f"{line}\n" for line in lines))
        return "rejections", {path.name: set()}

    def put_more(self) -> Hit:
        path = self.any(self.shards)
        more = path.with_name(path.name.replace("-00", "-01"))
        shutil.copy(path, more)
        return "one more", {more.name: set()}


def names_it(found: list[Damage], name: str, rows: set[int]) -> bool:
    """Whether the damage to a file, and to these rows of it, is among what was found."""
    stem = name.removesuffix(".npy").removesuffix(".rows").removesuffix(".mask")
    accepted = {name, f"{stem}.npy"} if name.endswith(".npy") else {name}
    if name[0].isdigit():  # a record and the list whose digest it has differ: either may be wrong
        accepted |= {name.replace(".json", ".rejected.jsonl")}
    named = [damage for damage in found if damage.file in accepted]
    return bool(named) and (not rows or any(rows <= set(damage.rows) for damage in named))


@pytest.fixture(scope="module", params=["text", "chat"])
def complete(request: Any, tmp_path_factory: Any) -> Any:
    """A folder with a prepared source of two units or more, with rejected records."""
    place, chat = tmp_path_factory.mktemp(request.param), request.param == "chat"
    for number in range(2 + (not chat)):
        texts = TEXTS[number * 20 : number * 20 + 16]
        rows: Any = [
            [{"from": "human", "value": t}, {"from": "gpt", "value": "yes"}] for t in texts
        ]
        column = "conversations" if chat else "text"
        write_jsonl(place / "in" / f"{number}.jsonl", [*(rows if chat else texts), 7, None], column)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 1 << 11)
        prepared(wanted(place, place / "in", chat))
        yield place, chat


def wanted(out: Path, files: Path, chat: bool) -> Any:
    return request(out, str(files), "slimorca" if chat else "mine", loss_mask=chat,
                   val_fraction=0.3, unit_bytes=1 << 11)  # fmt: skip


@pytest.fixture
def folder(complete: Any, tmp_path: Path) -> Any:
    """A copy of the source's folder, to damage."""
    (source,) = (path for path in complete[0].iterdir() if (path / "manifest.json").exists())
    return Path(shutil.copytree(source, tmp_path / source.name))


def put_back(folder: Path, before: dict[str, bytes]) -> None:
    for name, data in before.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != data:
            (folder / name).write_bytes(data)
    for path in folder.iterdir():
        if path.name not in before:
            path.unlink()


def test_of_a_thousand_random_damages_all_are_named(folder: Path) -> None:
    before, damage = contents(folder), RandomDamage(folder, seed=1)
    assert list(find_damage(folder)) == []
    missed = []
    for _ in range(int(os.environ.get("SUMMER_DAMAGES", "500"))):  # of text, and of conversations
        what, hit = damage.do()
        found = list(find_damage(folder))
        missed += [(what, name, rows, list(map(str, found)))
                   for name, rows in hit.items() if not names_it(found, name, rows)]  # fmt: skip
        put_back(folder, before)
    assert not missed, "\n".join(map(repr, missed))


def test_repair_redoes_the_units_concerned_and_no_others(complete: Any, folder: Path) -> None:
    place, chat = complete
    before, damage = contents(folder), RandomDamage(folder, seed=2)
    files = (str(place / "in"),)
    for turn in range(25):
        what, hit = damage.do()
        gone = {"units.json", "tokenizer.model"} & set(hit)
        units = {unit for name in hit if (unit := Damage(name, "").unit)}
        others = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()
                  if path.name[:5] not in units and path.name[0].isdigit()}  # fmt: skip
        if gone:
            with pytest.raises(
                PrepareError, match=rf"{gone.pop()} is missing or damaged: (delete|copy)"
            ):
                repair(folder, files, Executor())
            (folder / "units.json").unlink(missing_ok=True)
            prepared(wanted(folder.parent, place / "in", chat))
        else:
            assert repair(folder, files, Executor())
        assert contents(folder) == before, (turn, what, hit)
        for path, was in others.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == was, (turn, what, path)
