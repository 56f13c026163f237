"""Making vocabularies: learning one from sources, extending one, describing one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import TokenizerError
from pipeline.inputs.hub import open_inputs
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.reading import PartReader
from pipeline.inputs.sources import Source, SourceOverrides, find
from pipeline.text.documents import DocumentMaker, Documents
from pipeline.text.encode import make_encoder
from pipeline.text.tokenizer import Tokenizer, default_model, extend, train
from pipeline.units.units import cut_into_parts
from shards.files import publish_bytes


@dataclass(frozen=True)
class Texts:
    """What to learn from: sources by name, or local files; so many bytes of each."""

    names: Sequence[str]
    data_files: tuple[str, ...]
    text_column: str
    max_bytes: int

    def lines(self) -> Iterator[str]:
        """The lines of the documents, without those that are held out."""
        choice = SourceOverrides(data_files=self.data_files, text_column=self.text_column)
        for name in self.names or ("text",):
            source = find(name, choice)
            read = 0
            for documents in documents_of(source, open_inputs(source, self.data_files)):
                for text in documents.texts.to_pylist():
                    yield from filter(None, text.split("\n"))
                read += documents.texts.nbytes
                if read >= self.max_bytes:
                    break


def documents_of(source: Source, inputs: Inputs) -> Iterator[Documents]:
    """All documents of a source, in batches, in the order of its listing."""
    reader, maker = PartReader(inputs, source), DocumentMaker(source, val_fraction=0.0)
    try:
        for number, weighed in enumerate(cut_into_parts(inputs, source)):
            yield from maker.documents(number, weighed.part, reader.read(weighed.part))
    finally:
        reader.close()


def learn(texts: Texts, vocab_size: int, out: Path) -> Tokenizer:
    """The tokenizer learnt from the texts, written to `out`."""
    if not texts.names and not texts.data_files:
        raise TokenizerError("nothing to learn from: name --source or --data-files")
    lines = texts.lines()
    first = next(lines, None)
    if first is None:
        raise TokenizerError("there is no line of text in what was given to learn from")
    return _written(train(itertools.chain([first], lines), vocab_size), out)


def extended(path: Path, pieces: Sequence[str], out: Path) -> Tokenizer:
    """The tokenizer of a file with further control pieces, written to `out`."""
    try:
        model = default_model() if str(path) == "default" else path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}: name a .model file") from error
    return _written(extend(model, pieces), out)


def load(path: Path) -> Tokenizer:
    """The tokenizer of a file; `default` is the default one."""
    return Tokenizer.default() if str(path) == "default" else Tokenizer.load(path)


def describe(tokenizer: Tokenizer) -> str:
    """What there is to know of a tokenizer, in lines."""
    info, kinds = tokenizer.info, tokenizer.proto.SentencePiece
    control = [e.piece for e in tokenizer.proto.pieces if e.type == kinds.CONTROL]
    named = [piece for piece in control if not piece.startswith("[control_")]
    lines = [
        f"{info.name}: {info.vocab_size:,} entries, SHA-256 {info.sha256}",
        f"  BOS {info.bos_id}, EOS {info.eos_id}, padding {info.pad_id} (<unk>)",
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
