"""Tools: they use all other packages, and nobody imports them.

Commands       evaluate generate trace convert plan doctor report rehearse; demo (`make demo`)
command        what each of them has: -h, --version, failures in one line
models/        a run, a checkpoint or a Llama folder -> the model with its tokenizer
evaluation/    tasks (the table), multiple_choice, perplexity (protocols, wikitext), heldout,
               contamination (ngrams): each gives a Result (cards); scoring has the NLL
generation/    a prompt -> text
tracing/       a step -> what it saw, a document -> when it is seen
conversion/    to and from folders of Hugging Face, with a model card
diagnosis/     what the doctor checks          planning   memory, time and money on paper
rehearsal/     runs that are killed, and the comparison that shows no harm
reporting/     what a run wrote about itself, as a page
benchmarks/    one script for each speed target; RESULTS.md has what was measured
"""
