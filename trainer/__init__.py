"""Training: `summer-train` turns shards into weights. It knows sequences of ids, never text.

cli.py, start.py    from a command line to a plan, to one process or several
train.py            one page: loader, model, gradients, update, log, checkpoint
config/             every key, presets, the mixture, the plan of a run and its memory
data/               sample number -> source, epoch, row -> micro-batch on the device
distributed/        ranks, devices, how torchrun is started, requests to stop
optimizer/          optimizers and schedules, each a row of a table
checkpoint/         checkpoints written, verified, found, kept and copied
session/            a run opened, resumed and saved; its model, state, budget, a step's numbers
metrics/            logs, events, the display, where seconds went, profiles
faults/             updates skipped, ranks that hang, injected faults
validation/         held-out loss and bits a byte
"""
