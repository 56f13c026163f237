"""Text -> shards: read, tokenize, pack, publish, exactly once. The command is `summer-prep`.

prepare.py      the journey of one source, in numbered steps: start reading here
estimate.py     what the work will take, from a first sample; progress.py shows it
learn.py        learning a vocabulary from sources, extending and describing one
inputs/         where bytes come from: the table of sources, local files, the Hub -> records
text/           records -> documents -> ids -> rows
units/          who does what: the recipe, the plan, one unit of work, executors
checks/         looking at what was made: verify, repair, inspect
"""
