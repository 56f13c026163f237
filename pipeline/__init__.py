"""Text -> shards: read, tokenize, pack, publish, exactly once. The command is `summer-prep`.

prepare.py      the journey of one source, in numbered steps: start reading here
sources.py      the table of corpora: where each is read from, its licence, its state
inputs.py       where bytes come from: a local folder, the Hub (hub.py), this interpreter
reading.py      files -> records: parquet, jsonl, plain text, compressed or not
documents.py    records -> documents: texts, pages joined from lines, conversations (chat.py)
units.py        the plan: which part of the input belongs to which unit of work
tokenizer.py    the vocabulary: base, extension, training one; ids <-> text
encode.py       documents -> ids
pack.py         ids -> rows
executors.py    who runs the units: this process, a pool, a part of an array, Ray
verify.py       every row checked, and the bad units done again
inspection.py   what a folder of shards holds, in words
cli.py          the command line
"""
