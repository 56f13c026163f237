"""What the files of the shard format hold: row records, manifest, unit record, dataset hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from shards.errors import ShardError, VersionError
from shards.shape import build
from shards.versions import FORMAT_KEY, SHARDS, check_format

MANIFEST: Final = "manifest.json"
PLAN: Final = "units.json"
TOKENIZER: Final = "tokenizer.model"
TOKENIZER_JSON: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
"""Next to a tokenizer.json: which of its special tokens are BOS, EOS and padding."""
TOKENIZER_FILES: Final = (TOKENIZER, TOKENIZER_JSON, TOKENIZER_CONFIG)
"""Those that are there are kept together: one of the first two, and the third with the second."""
TOKEN_BYTES: Final = "token_bytes.npy"
"""UTF-8 bytes of text that each id stands for: [vocab_size, 2], `<u2` (`<u4` if one needs it).

[:, 0] in the middle of a text, [:, 1] behind a control piece: the space that sentencepiece puts
before each text is not the text's own. So targets `ids` that follow `before` add
`table[ids, (table[before, 0] == 0) * 1]` bytes (control pieces and padding have 0).
"""

EXCLUDED: Final = "excluded.ngrams"
"""Only with --exclude: the list of sequences whose documents were left out."""

MAX_SEQ_LEN: Final = 1 << 20
MAX_VOCAB: Final = 1 << 24

Split = Literal["train", "val"]
Packing = Literal["concat", "concat+mask"]
Tokens = npt.NDArray[np.unsignedinteger[Any]]  # [n, seq_len], uint16 or uint32
Masks = npt.NDArray[np.uint8]  # [n, seq_len / 8], bitorder "little", 1 = a target
Ordinals = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]

ROW_RECORD: Final = np.dtype([("xxh3", "<u8"), ("part", "<u4"), ("record", "<u4")])
"""One row's sidecar entry: its digest, and the part and record its first token comes from."""

T = TypeVar("T")
L = TypeVar("L", "UnitRecord", "Manifest")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The little-endian type of ids: uint16 while all fit (up to 65,536 entries), else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def row_digest(row: Tokens, mask: Masks | None = None) -> int:
    """XXH3-64 of a row's bytes, then of its mask's bytes if it has one."""
    data = row if mask is None else row.tobytes() + mask.tobytes()
    return xxhash.xxh3_64_intdigest(data)  # type: ignore[arg-type]


def row_digests(rows: Tokens, masks: Masks | None = None) -> npt.NDArray[np.uint64]:
    """The digest of each row with its mask. [n]"""
    pairs = (np.ascontiguousarray(rows),) if masks is None else (rows, masks)
    return np.fromiter(map(row_digest, *pairs), np.uint64, len(rows))


def tokenizer_path(folder: Path) -> Path:
    """Where a folder's tokenizer is: its tokenizer.model, or else its tokenizer.json."""
    model, described = folder / TOKENIZER, folder / TOKENIZER_JSON
    return described if described.exists() and not model.exists() else model


def unit_name(position: int) -> str:
    """A unit's name is its position in the plan's order."""
    return f"{position:05d}"


@dataclass(frozen=True, kw_only=True)
class ManifestTokenizer:
    """Which tokenizer made the ids. `sha256` is that of its .model or tokenizer.json file."""

    name: str
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """A slice [first, last) of an input file.

    Row groups of a parquet file, bytes of a plain text or jsonl file; a compressed file is one
    part, [0, its size).
    """

    file: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard. `n_tokens` leaves out padding; `n_documents` counts those that begin in it."""

    file: str
    split: Split
    n_rows: int
    n_tokens: int
    n_documents: int
    bytes: int
    rows_sha256: str

    @property
    def stem(self) -> str:
        """The file's name without `.npy`: the sidecars' names begin with it."""
        return self.file.removesuffix(".npy")


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What one unit became, published last: a unit without its record is done again."""

    unit: str
    plan_sha256: str
    shards: tuple[ShardInfo, ...]
    rejected: Mapping[str, int]
    rejected_sha256: str | None

    def to_json(self) -> dict[str, object]:
        """The record as it stands in `<unit>.json`."""
        return {FORMAT_KEY: SHARDS, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> UnitRecord:
        """The record that a JSON object spells; ShardError if it spells none."""
        value = _known_format(value, "the unit record")
        return _checked(_built(cls, value))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is fixed before the first row is written: source, shape of rows, tokenizer."""

    source: str
    dataset: str
    revision: str
    licence: str
    seq_len: int
    dtype: str
    packing: Packing
    val_fraction: float
    tokenizer: ManifestTokenizer
    exclude: Mapping[str, Any] | None = None
    """With --exclude: `sha256` of the list, and the `tasks` whose text is left out."""
    shape: str = field(default="", compare=False)  # earlier versions did not write it
    """What records are: documents, lines or chat; empty where it is not known."""

    @property
    def masked(self) -> bool:
        """Whether rows carry a loss mask."""
        return self.packing == "concat+mask"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished source. Counts are over both splits; `n_val_rows` of the rows are held out."""

    facts: Facts
    n_rows: int
    n_tokens: int
    n_documents: int
    n_val_rows: int
    rejected: Mapping[str, int]
    parts: tuple[Part, ...]
    shards: tuple[ShardInfo, ...]
    root: str

    def split(self, name: Split) -> tuple[ShardInfo, ...]:
        """The shards of one split, in the order in which their rows are numbered."""
        return tuple(shard for shard in self.shards if shard.split == name)

    def to_json(self) -> dict[str, object]:
        """The manifest as it stands in manifest.json."""
        counts = asdict(self)
        facts = counts.pop("facts")
        later = [key for key in ("exclude", "shape") if not facts[key]]
        for key in later:  # absent, as earlier versions wrote it
            del facts[key]
        return {FORMAT_KEY: SHARDS, **facts, **counts}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """The manifest that a JSON object spells; ShardError if none, or if `root` differs."""
        value = _known_format(value, "the manifest")
        manifest = _checked(_built(cls, {**value, "facts": value}))
        listed = (manifest.parts, manifest.shards, manifest.rejected)
        if manifest != summarise(facts_of(value), *listed):
            raise ShardError("its counts or its dataset hash (`root`) do not fit what it lists")
        return manifest


def summarise(
    facts: Facts,
    parts: Iterable[Part],
    shards: Iterable[ShardInfo],
    rejected: Mapping[str, int],
) -> Manifest:
    """The manifest of these shards: counts added up, `root` computed."""
    shards = tuple(shards)
    return Manifest(
        facts=facts,
        n_rows=sum(shard.n_rows for shard in shards),
        n_tokens=sum(shard.n_tokens for shard in shards),
        n_documents=sum(shard.n_documents for shard in shards),
        n_val_rows=sum(shard.n_rows for shard in shards if shard.split == "val"),
        rejected=dict(rejected),
        parts=tuple(parts),
        shards=shards,
        root=compute_root(facts, shards),
    )


def combine(facts: Facts, parts: Iterable[Part], records: Iterable[UnitRecord]) -> Manifest:
    """The manifest of these units."""
    records = tuple(records)
    rejected = sum((Counter(record.rejected) for record in records), Counter[str]())
    shards = (shard for record in records for shard in record.shards)
    return summarise(facts, parts, shards, dict(sorted(rejected.items())))


def compute_root(facts: Facts, shards: Iterable[ShardInfo]) -> str:
    """SHA-256 that names the data by content: everything a training run could see depends on it."""
    tokenizer = facts.tokenizer
    lines = [
        SHARDS,
        f"{facts.dtype} {facts.seq_len} {facts.packing} {facts.val_fraction}",
        tokenizer.sha256,
        f"{tokenizer.bos_id} {tokenizer.eos_id} {tokenizer.pad_id}",
        *(f"{shard.split} {shard.n_rows} {shard.rows_sha256}" for shard in shards),
    ]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def parse_json(data: bytes) -> Any:
    """The JSON value, or ShardError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter: nested by thousands
        raise ShardError(f"it is no JSON ({error})") from error


def _known_format(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ShardError(f"{what} is no JSON object")
    try:
        check_format(value, SHARDS, what)
    except VersionError as error:  # of another version, or damaged: verify and repair take it
        raise ShardError(str(error)) from error
    return value


def facts_of(value: object) -> Facts:
    """The facts in a plan or a manifest; ShardError if it has none, or impossible ones."""
    facts = _built(Facts, value)
    tokenizer = facts.tokenizer
    ends = max(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    for what, is_possible in {
        f"dtype {facts.dtype}": facts.dtype in ("uint16", "uint32"),
        f"seq_len {facts.seq_len}": 2 <= facts.seq_len <= MAX_SEQ_LEN,
        f"val_fraction {facts.val_fraction}": 0 <= facts.val_fraction <= 1,
        f"special tokens up to {ends}": ends < tokenizer.vocab_size <= MAX_VOCAB,
    }.items():
        if not is_possible:
            raise ShardError(f"{what} cannot be")
    return facts


def _built(cls: type[T], value: object) -> T:
    try:
        return build(cls, value)
    except ValueError as error:
        raise ShardError(str(error).lstrip(". ")) from error


def _checked(listing: L) -> L:
    """ShardError if what lists shards names a file that can be none of its own folder."""
    for shard in listing.shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.npy", shard.file):
            raise ShardError(f"{shard.file!r} is no name of a shard in its own folder")
    return listing
