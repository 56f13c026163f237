"""Tools: they look at the floors below from above, and nobody imports them.

Commands       evaluate generate trace convert plan doctor report rehearse; demo (`make demo`)
loading        a run, a checkpoint or a Llama folder -> the model with its tokenizer
vocabulary     what a tokenizer must offer to be scored or to write
evaluation/    tasks (the table), multiple_choice, perplexity (protocols, wikitext), heldout,
               contamination (ngrams): each gives a Result; scoring has the NLL
generation/    a prompt -> text
tracing/       a step -> what it saw, a document -> when it is seen
planning       memory, time and money on paper
checks         the doctor's examinations: with host, speed, collective, shard_checks, variables
conversion     to and from llama.py's folders of Llama-family models
runlog         what a run wrote about itself          figures, report_page  as picture and page
interruption   runs that are killed, and the proof that it did no harm; rehearsal does it in a row
benchmarks/    one script a bar; RESULTS.md has what was measured
"""
