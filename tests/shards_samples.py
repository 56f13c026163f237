"""Small sources for tests, written by the real writer."""

from pathlib import Path

import numpy as np

from shards.format import Facts, Manifest, ManifestTokenizer, Part, token_dtype
from shards.writer import ShardWriter, write_manifest

TOKENIZER = ManifestTokenizer(
    name="sample", sha256="0" * 64, vocab_size=512, bos_id=1, eos_id=2, pad_id=0
)


def sample_facts(
    source: str = "s", seq_len: int = 16, vocab_size: int = 512, masked: bool = False
) -> Facts:
    return Facts(
        source=source,
        dataset="tests/sample",
        revision="0" * 40,
        licence="none",
        seq_len=seq_len,
        dtype=token_dtype(vocab_size).name,
        packing="concat+mask" if masked else "concat",
        val_fraction=0.1,
        tokenizer=ManifestTokenizer(**{**TOKENIZER.__dict__, "vocab_size": vocab_size}),
    )


def make_source(
    folder: Path,
    *,
    n_rows: int = 20,
    n_val_rows: int = 4,
    seq_len: int = 16,
    vocab_size: int = 512,
    masked: bool = False,
    n_units: int = 2,
    seed: int = 0,
) -> Manifest:
    """A source of random rows that begin with BOS; its folder gives its name."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = sample_facts(folder.name, seq_len, vocab_size, masked)
    generator = np.random.default_rng(seed)
    for position in range(n_units):
        writer = ShardWriter(folder, f"{position:05d}", facts)
        for split, total in (("train", n_rows), ("val", n_val_rows)):
            n = total // n_units + (position < total % n_units)
            rows = generator.integers(3, vocab_size, (n, seq_len)).astype(facts.dtype)
            rows[:, 0] = facts.tokenizer.bos_id
            masks = generator.integers(0, 256, (n, seq_len // 8), np.uint8) if masked else None
            parts = np.full(n, position, np.uint32)
            writer.add(split, rows, parts, np.arange(n, dtype=np.uint32), masks)  # type: ignore[arg-type]
        writer.finish([], plan_sha256="0" * 64)
    parts_list = [Part(file=f"{i}.txt", first=0, last=1) for i in range(n_units)]
    manifest = write_manifest(folder, facts, parts_list, n_units)
    assert manifest is not None
    return manifest
