"""Text -> shards: read, tokenize, pack, publish, exactly once. The command is `summer-prep`.

prepare.py         the journey of one source, in numbered steps: start reading here
estimate.py        what the work will take, from a first sample
progress.py        what a person sees meanwhile
vocabulary.py      learning a vocabulary from sources, describing one
cli.py             the command line
inputs/            where bytes come from
  sources.py         the table of corpora: a new one is a row
  inputs.py          local files, this interpreter, or
  hub.py             the Hub: a listing pinned to a commit, read with retries
  reading.py         files -> records: parquet, jsonl, plain text, compressed or not
text/              records -> rows
  documents.py       records -> documents: texts, pages joined from lines, conversations
  chat.py            conversations -> ids; the schemas they come in: a new one is a row
  tokenizer.py       a vocabulary: the base, extending it, training one; ids <-> text
  encode.py          documents -> ids, by columnar.py or by sentencepiece itself
  pack.py            ids -> rows
units/             who does what
  recipe.py          what is asked for, and all that the output depends on
  units.py           the plan: which part of the input belongs to which unit of work
  job.py             what workers are given and what they report
  work.py            one unit, from text to its record
  dispatch.py        which unit next, and where a limit falls
  executors.py       who runs the units: this process, a pool, or Ray (cluster.py)
checks/            looking at what was made
  verify.py          every row and file checked
  repair.py          damaged units done again
  inspection.py      what a folder of shards holds, in words
"""
