"""Vocabularies for `summer-prep tokenizer`: learning one from sources, extending, describing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import TokenizerError
from pipeline.inputs.sources import SourceOverrides, find
from pipeline.inputs.urls import open_inputs
from pipeline.text.documents import DocumentMaker
from pipeline.text.encode import make_encoder
from pipeline.text.tokenizer import SPARE, Tokenizer, default_model, extend, train
from pipeline.units.units import cut_into_parts
from shards.files import publish_bytes


def lines_of(names: Sequence[str], choice: SourceOverrides, max_bytes: int) -> Iterator[str]:
    """The lines of sources by name, or of local files: so many bytes of each."""
    if not names and not choice.data_files:
        raise TokenizerError("nothing to learn from: name --source or --data-files")
    for name in names or ("text",):
        source, read = find(name, choice), 0
        inputs = open_inputs(source, choice.data_files)
        parts = enumerate(weighed.part for weighed in cut_into_parts(inputs, source))
        for documents in DocumentMaker(source, 0.0).read(inputs, parts):
            for text in documents.texts.to_pylist():
                yield from filter(None, text.split("\n"))
            read += documents.texts.nbytes
            if read >= max_bytes:
                break


def learn(lines: Iterator[str], vocab_size: int, out: Path) -> Tokenizer:
    """The tokenizer learnt from the lines, written to `out`."""
    first = next(lines, None)
    if first is None:
        raise TokenizerError("there is no line of text in what was given to learn from")
    return _written(train(itertools.chain([first], lines), vocab_size), out)


def extended(path: Path, pieces: Sequence[str], out: Path) -> Tokenizer:
    """The tokenizer of a file, or `default`, with further control pieces, written to `out`."""
    model = default_model() if str(path) == "default" else path.read_bytes()
    return _written(extend(model, pieces, str(path)), out)


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """What there is to know of a tokenizer, in lines."""
    info, control = tokenizer.info, tokenizer.control_pieces
    named = [piece for piece in control if not SPARE.fullmatch(piece)]
    lines = [
        f"{info.name}: {info.vocab_size:,} entries, SHA-256 {info.sha256}",
        f"  BOS {info.bos_id}, EOS {info.eos_id}, padding {info.pad_id} "
        f"({tokenizer.piece(info.pad_id)})",
        f"  control pieces {' '.join(named)}",
        f"  spare slots    {len(control) - len(named)}",
        f"  encoding       {make_encoder(tokenizer).note}",
    ]
    return "\n".join(lines)


def _written(model: bytes, out: Path) -> Tokenizer:
    tokenizer = Tokenizer(model, out.name.removesuffix(".model"))
    out.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(out, model)
    return tokenizer
