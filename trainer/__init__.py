"""Training: `summer-train` turns shards into weights. It knows rows of ids and never sees text.

config.py       every key, its default, presets, --set
shares.py       which sources are drawn, and how much of each
mixture.py      sample number -> source, epoch, row: the data order as a pure function
loader.py       rows -> micro-batches on the device
plan.py         the configuration, the data and the machine, brought together before step 1
memory.py       bytes a device needs, by part      devices.py   what known devices have
schedule.py     learning rate as a function of step
optimizer.py    AdamW, clipping with exact token weights, skipped updates
distributed.py  ranks, reductions, threads         launch.py    one process for each device
parallel.py     compile, checkpoint and replicate the model
checkpoint.py   commits: all of a run's state, proven by digests
runs.py         where a run keeps things
guard.py        which updates were refused, and when that is too often
validation.py   held-out loss of each source
metrics.py      metrics.jsonl, events.jsonl, TensorBoard    screen.py  what a person sees
train.py        the loop                           cli.py       the command
"""
