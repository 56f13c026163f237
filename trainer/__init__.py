"""Training: `summer-train` turns shards into weights. It knows sequences of ids, never text.

cli.py, start.py    from a command line to a plan, to one process or several
train.py            one page: loader, model, gradients, update, log, checkpoint
config/             every key, presets, the mixture, the plan of a run and its memory
data/               sample number -> source, epoch, row -> micro-batch on the device
distributed/        ranks, what devices have, and how torchrun is started
optimizer/          optimizers and schedules, each a row of a table
checkpoint/         where a run keeps things; checkpoints written, verified, kept and copied
session/            a run opened, resumed, saved and closed; what its steps lead to
metrics/            a step's numbers, logs, events, where seconds went, profiles
faults/             updates skipped, ranks that hang, requests to stop, injected faults
validation/         held-out loss and bits a byte
background.py       jobs in a thread of their own
errors.py           what can go wrong
"""
