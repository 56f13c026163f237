"""Training: `summer-train` turns shards into weights. It knows rows of ids and never sees text.

Before the first step:
    config.py       every key, its default, presets, --set
    shares.py       which sources are drawn, and how much of each
    plan.py         the configuration, the data and the machine brought together, or refused
    memory.py       bytes that a device needs, by part
    devices.py      what known devices have
    start.py        from a command line to a plan, to one process or several
    launch.py       one process for each device, through torchrun
    session.py      a run opened or resumed, and closed

The loop:
    train.py        one page: loader, model, gradients, update, log, checkpoint
    mixture.py      sample number -> source, epoch, row: the data order as a pure function
    batches.py      rows -> micro-batches of one rank
    loader.py       micro-batches, read ahead by workers, on the device
    parallel.py     the model compiled, recomputed, replicated or sharded
    allocator.py    freed memory that stays with the process
    schedule.py     the learning rate as a function of the step
    optimizer.py    AdamW, clipping with exact token weights, refused updates
    tally.py        a step's numbers, reduced once and read one step late
    validation.py   held-out loss of each source, and bits a byte
    text_bytes.py   how many bytes of text ids stand for
    profiling.py    chosen steps under torch's profiler
    budget.py       when a budget in dollars begins to anneal, and ends the run
    checkpoints.py      when a checkpoint is due, written beside training; what is kept, and
                        mirrored
    aftermath.py    what a step's numbers ask for: stop, roll back, checkpoint
    guard.py        updates that would do harm, refused; what is left out when that persists

What stays:
    runs.py         where a run keeps things
    state.py        what changes while it trains, and how it is found again
    checkpoint.py   checkpoints: all of that on disk, proven by digests
    retention.py    which of them stand: found, set aside, purged, copied
    metrics.py      metrics.jsonl, events.jsonl, TensorBoard
    logbook.py      a step's numbers made into a line
    ledger.py       what each source gave, and will have given at the end
    goodput.py      where each second went
    screen.py       what a person sees

distributed.py (ranks), signals.py (asked to stop), heartbeat.py (ranks that hang), faults.py (what
one rank alone notices) and errors.py serve all of them; inject.py makes faults on order; cli.py is
the command.
"""
