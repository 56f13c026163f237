"""The shard format, `summerlm-shards/1`: tokens on disk, with a digest of each row.

shards/README.md is the specification: files, rows, digests, with an example in NumPy.

    format.py   row records, manifest, unit record, dataset hash
    writer.py   rows -> shards, unit records, manifest
    reader.py   manifest -> rows, each one checked as it is read
    files.py    publishing a file so that nobody ever sees half of it
    versions.py the formats of all files, and which version reads which
    errors.py   the root of the error tree, one-line failures
"""
