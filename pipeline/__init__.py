"""Text -> shards: read, tokenize, pack, publish, exactly once. The command is `summer-prep`.

prepare.py      the journey of one source, in numbered steps: start reading here
recipe.py       what is asked for, and all that the output depends on
sources.py      the table of corpora: where each is read from, its licence, its state
inputs.py       where bytes come from: local files, this interpreter, or
hub.py          the Hub: a listing pinned to a commit, read with patience
units.py        the plan: which part of the input belongs to which unit of work
estimate.py     what the work will take, from a first sample
schedule.py     which unit next, and where a limit falls
executors.py    who runs the units: this process, a pool, a Ray cluster
work.py         one unit, from text to receipt:
  reading.py      files -> records: parquet, jsonl, plain text, compressed or not
  documents.py    records -> documents: texts, pages joined from lines,
  chat.py         conversations
  encode.py       documents -> ids, by columnar.py and slices.py or by sentencepiece itself
  pack.py         ids -> rows
tokenizer.py    a vocabulary: the base, extending it, training one; ids <-> text
vocabulary.py   learning one from sources, describing one
inspection.py   what a folder of shards holds, in words
verify.py       every row and file checked
repair.py       damaged units done again
progress.py     what a person sees meanwhile
cli.py          the command line
"""
