"""The shard format, `summerlm-shards/1`: tokens on disk, with a digest of each row.

    shards/<source>/
      00000-000.npy            rows of unit 00000: [n_rows, seq_len], little-endian uint16/uint32
      00000-000.rows.npy       one record a row: xxh3 (u8), part (u4), record (u4)
      00000-000.mask.npy       only with a loss mask: [n_rows, seq_len / 8] bits, 1 = a target
      00000-val-000.npy        the same three for documents that are held out
      00000.rejected.jsonl     records rejected: reason, file, record
      00000.json               the unit's record, published last: without it the unit is redone
      units.json               the plan: parts of the input and the units they were put into
      tokenizer.model          the SentencePiece model that made the ids
      token_bytes.npy          bytes of text that each id stands for
      manifest.json            written when all unit records are there; before, no source

A **row** is `seq_len` tokens of the stream `BOS doc EOS BOS doc EOS ...`; a document may run on
into the next row of its unit, and the last row of a unit is filled with `pad_id`. A row's `xxh3`
is the XXH3-64 of its bytes, followed by its mask's bytes if there is a mask; `part` and `record`
say which input its first token came from. The dataset hash (the manifest's `root`) is the SHA-256
that names the data set by its content. shards/README.md is the full specification, with an example
in NumPy.

    format.py   row records, manifest, unit record, dataset hash
    writer.py   rows -> shards, unit records, manifest
    reader.py   manifest -> rows, each one checked as it is read
    files.py    publishing a file so that nobody ever sees half of it
    errors.py   the root of the error tree, one-line failures
"""
