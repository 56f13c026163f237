"""What others do with the same parquet files: one pipeline each, as their users would write it.

    python tools/benchmarks/peers.py gigatoken JOB.json

Each runs as a process of its own and imports what it needs and nothing else. A job is a JSON
object: files (parquet), lines (the same as json lines), column, model (a SentencePiece file),
tokenizer (the same as a tokenizer.json), workers, out.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

SEQ_LEN = 4096
_state: dict[str, Any] = {}


def gigatoken(job: dict[str, Any]) -> None:
    """Its own parquet reader, BOS and EOS put in with numpy, rows of uint16; a process a file."""
    with multiprocessing.Pool(job["workers"], _load_gigatoken, [job]) as pool:
        pool.map(_gigatoken_file, job["files"], chunksize=1)


def gigatoken_pyarrow(job: dict[str, Any]) -> None:
    """The same, but parquet is read by pyarrow a thousand documents at a time."""
    with multiprocessing.Pool(job["workers"], _load_gigatoken, [job]) as pool:
        pool.map(_gigatoken_batches, job["files"], chunksize=1)


def _load_gigatoken(job: dict[str, Any]) -> None:
    import gigatoken  # type: ignore[import-not-found]

    _state.update(job, encoder=gigatoken.Tokenizer.from_sentencepiece(Path(job["model"])))


def _gigatoken_file(path: str) -> None:
    import gigatoken

    source = gigatoken.ParquetFileSource([path], _state["column"])
    _write_rows(Path(path).stem, _packed(_state["encoder"].encode_files(source)))


def _gigatoken_batches(path: str) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    column = _state["column"]
    batches = pq.ParquetFile(path).iter_batches(1000, columns=[column], use_threads=False)
    streams = [_packed(_state["encoder"].encode_batch(b.column(0).to_pylist())) for b in batches]
    _write_rows(Path(path).stem, np.concatenate(streams))


def _packed(encoded: Any) -> Any:
    """`BOS doc EOS BOS doc EOS ...` of gigatoken's ragged array, as uint16."""
    import numpy as np

    offsets, ids = encoded.layout.offsets.data, encoded.layout.content.data
    n = len(offsets) - 1
    stream = np.empty(offsets[-1] - offsets[0] + 2 * n, np.uint16)
    bos = offsets[:-1] - offsets[0] + 2 * np.arange(n)
    eos = bos + np.diff(offsets) + 1
    text = np.ones(len(stream), np.bool_)
    text[bos] = text[eos] = False
    stream[text] = ids[offsets[0] : offsets[-1]]
    stream[bos], stream[eos] = 1, 2
    return stream


def _write_rows(name: str, stream: Any) -> None:
    import numpy as np

    rows = np.pad(stream, (0, -len(stream) % SEQ_LEN)).reshape(-1, SEQ_LEN)
    np.save(Path(_state["out"]) / f"{name}.npy", rows)


def datatrove(job: dict[str, Any]) -> None:
    """ParquetReader and DocumentTokenizer, not shuffled, in a LocalPipelineExecutor."""
    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import ParquetReader  # type: ignore[import-not-found]
    from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found]

    out = job["out"]
    LocalPipelineExecutor(
        [
            ParquetReader(str(Path(job["files"][0]).parent), text_key=job["column"]),
            # batches of 10,000, its default, take gigabytes
            DocumentTokenizer(out, job["tokenizer"], eos_token="</s>", batch_size=1000,
                              shuffle_documents=False),
        ],
        tasks=job["workers"],
        workers=job["workers"],
        logging_dir=f"{out}/logs",
    ).run()  # fmt: skip


def megatron(job: dict[str, Any]) -> None:
    """Megatron-LM's preprocess_data, its loop rewritten around megatron-core's own builder.

    The script is no part of any package. What it does: a pool maps json lines to ids with
    sentencepiece, 32 lines at a time and in order; the parent appends them to an IndexedDataset.
    """
    from megatron.core.datasets.indexed_dataset import (  # type: ignore[import-not-found]
        DType,
        IndexedDatasetBuilder,
    )

    out = Path(job["out"])
    _load_sentencepiece(job)
    dtype = DType.optimal_dtype(_state["processor"].get_piece_size())
    builder = IndexedDatasetBuilder(str(out / "text.bin"), dtype=dtype)
    with (
        Path(job["lines"]).open(encoding="utf-8") as lines,
        multiprocessing.Pool(job["workers"], _load_sentencepiece, [job]) as pool,
    ):
        ids: list[int]
        for ids in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(str(out / "text.idx"))


def _load_sentencepiece(job: dict[str, Any]) -> None:
    import sentencepiece

    _state.update(processor=sentencepiece.SentencePieceProcessor(model_file=job["model"]))


def _encode_line(line: str) -> list[int]:
    processor = _state["processor"]
    return [*processor.encode(json.loads(line)["text"]), processor.eos_id()]


PEERS = {
    "gigatoken": gigatoken,
    "gigatoken-pyarrow": gigatoken_pyarrow,
    "megatron": megatron,
    "datatrove": datatrove,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
