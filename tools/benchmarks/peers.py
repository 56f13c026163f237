"""What others do with the same parquet files: one pipeline each, as their users would write it.

    python tools/benchmarks/peers.py gigatoken JOB.json

Each runs as a process of its own and imports what it needs and nothing else. A job is a JSON
object: files (parquet), column, workers, out, and folder, which holds lines.jsonl (the same as json
lines), tokenizer.model and tokenizer.json.
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


def _load_gigatoken(job: dict[str, Any]) -> None:
    import gigatoken  # type: ignore[import-not-found]

    model = Path(job["folder"]) / "tokenizer.model"
    _state.update(job, encoder=gigatoken.Tokenizer.from_sentencepiece(model))


def _gigatoken_file(path: str) -> None:
    import gigatoken
    import numpy as np

    source = gigatoken.ParquetFileSource([path], _state["column"])
    stream = _packed(_state["encoder"].encode_files(source))
    rows = np.pad(stream, (0, -len(stream) % SEQ_LEN)).reshape(-1, SEQ_LEN)
    np.save(Path(_state["out"]) / f"{Path(path).stem}.npy", rows)


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


def datatrove(job: dict[str, Any]) -> None:
    """ParquetReader and DocumentTokenizer, not shuffled, in a LocalPipelineExecutor."""
    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import ParquetReader  # type: ignore[import-not-found]
    from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found]

    out, tokenizer = job["out"], f"{job['folder']}/tokenizer.json"
    LocalPipelineExecutor(
        [
            ParquetReader(str(Path(job["files"][0]).parent), text_key=job["column"]),
            # batches of 10,000, its default, take gigabytes
            DocumentTokenizer(out, tokenizer, eos_token="</s>", batch_size=1000,
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
    from megatron.core.datasets import indexed_dataset  # type: ignore[import-not-found]

    out = Path(job["out"])
    _load_sentencepiece(job)
    dtype = indexed_dataset.DType.optimal_dtype(_state["processor"].get_piece_size())
    builder = indexed_dataset.IndexedDatasetBuilder(str(out / "text.bin"), dtype=dtype)
    with (
        (Path(job["folder"]) / "lines.jsonl").open(encoding="utf-8") as lines,
        multiprocessing.Pool(job["workers"], _load_sentencepiece, [job]) as pool,
    ):
        ids: list[int]
        for ids in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(str(out / "text.idx"))


def _load_sentencepiece(job: dict[str, Any]) -> None:
    import sentencepiece

    model = f"{job['folder']}/tokenizer.model"
    _state.update(processor=sentencepiece.SentencePieceProcessor(model_file=model))


def _encode_line(line: str) -> list[int]:
    processor = _state["processor"]
    return [*processor.encode(json.loads(line)["text"]), processor.eos_id()]


PEERS = {"gigatoken": gigatoken, "megatron": megatron, "datatrove": datatrove}

if __name__ == "__main__":
    PEERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
