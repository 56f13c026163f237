"""From a command line to a run: configure, plan, launch where there are several devices, train."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import torch

from model.config import count_params
from trainer.checkpoint.runs import CONFIG, checkpoints
from trainer.config.config import Configured, RunConfig, earlier_run, load_config
from trainer.config.resolve import make_plan
from trainer.config.train_plan import TrainPlan
from trainer.distributed import launch as launching
from trainer.distributed.devices import check_devices, pick_device
from trainer.distributed.launch import ASKED_TO_STOP, EXIT_REASON, Launch
from trainer.distributed.machines import machine_counts
from trainer.distributed.world import adopt_launcher, launched_by_torchrun
from trainer.errors import ConfigError
from trainer.faults.inject import parse_faults
from trainer.metrics.display import Display
from trainer.optimizer.optimizer import optimizer_bytes
from trainer.session.resume import check_start, measured_rate, peek_state, show_plan
from trainer.session.state import check_max_epochs
from trainer.train import train


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    configured: Configured
    shards: str
    preset: str | None = None
    file: Path | None = None
    sets: tuple[str, ...] = ()
    out: Path | None = None
    resume: str = "auto"
    dry_run: bool = False
    nproc: int | None = None
    nnodes: str = "1"
    torchrun: Mapping[str, str] = field(default_factory=dict)

    def for_rank(self, run: Path) -> list[str]:
        """The command line of one rank, without torchrun's own flags."""
        options = {
            "--shards": self.shards,
            "--preset": self.preset,
            "--config": self.file,
            "--out": run,
            "--resume": self.resume,
        }
        given = [text for k, v in options.items() if v is not None for text in (k, str(v))]
        return given + [text for change in self.sets for text in ("--set", change)]


def start(request: Request, stream: TextIO) -> int:
    """The exit code: 0 when the run is complete, 75 when it was asked to stop and has saved."""
    note = adopt_launcher(os.environ)
    configured = request.configured
    parse_faults()  # a mistake in it is reported once, here
    run = request.out or _default_run(Path("runs") / configured.config.preset, request.resume)
    if EXIT_REASON in os.environ:
        launching.end_with_launcher()
        return launching.write_exit_reason(lambda: _train_as_rank(configured, run, request, stream))
    if launched_by_torchrun():
        return _train_as_rank(configured, run, request, stream)
    kind = pick_device(configured.config.device)
    n_local = request.nproc or (torch.cuda.device_count() if kind == "cuda" else 1)
    check_devices(kind, n_local)
    _, machines = machine_counts(request.nnodes)
    earlier = _earlier(run, request)
    plan = make_plan(configured, n_local * machines, n_local, earlier)
    display = Display(stream)
    with contextlib.closing(display):
        if note:
            display.print(note)
        _check_machines(request)
        if request.dry_run:
            check_start(plan, run, request.resume)
            state = peek_state(plan, run, request.resume)
            show_plan(plan, state, measured_rate(run), display)
            check_max_epochs(plan, state)
            return 0
        if plan.shape.world_size == 1:
            return _train(plan, run, request, display)
        n_bytes = 4 + optimizer_bytes(plan.config.optim)  # a parameter and its moments, fp32
        state_bytes = n_bytes * count_params(plan.config.model)
        options = tuple(f"--{k.replace('_', '-')}={v}" for k, v in request.torchrun.items())
        launch = Launch(n_local, request.nnodes, state_bytes, options)
        display.print(launching.launch_line(launch, request.for_rank(run)))
    return launching.run_on_all(launch, request.for_rank(run))


def _check_machines(request: Request) -> None:
    """ConfigError unless several machines know where to meet, and under which name."""
    if request.nnodes != "1" and "rdzv_endpoint" not in request.torchrun:
        raise ConfigError(
            f"--nnodes {request.nnodes}: say where the machines meet, "
            "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
        )
    if request.nnodes != "1" and "rdzv_id" not in request.torchrun:
        raise ConfigError(
            f"--nnodes {request.nnodes}: give the machines of this job a name that others "
            f"cannot guess, on each the same: --rdzv-id {secrets.token_hex(8)}"
        )


def _train_as_rank(configured: Configured, run: Path, request: Request, stream: TextIO) -> int:
    ranks, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    plan = make_plan(configured, ranks, here, _earlier(run, request))
    display = Display(stream if os.environ["RANK"] == "0" else None)
    return _train(plan, run, request, display)


def _earlier(run: Path, request: Request) -> RunConfig | None:
    """The configuration of the run that goes on, without its mixture where a file gives one."""
    run = earlier_run(run, request.resume) or run
    if not (run / CONFIG).exists() or not checkpoints(run):
        return None
    config = load_config(run)
    return replace(config, mixture={}) if request.file else config


def _train(plan: TrainPlan, run: Path, request: Request, display: Display) -> int:
    with contextlib.closing(display):
        outcome = train(plan, run, resume=request.resume, display=display)
        return ASKED_TO_STOP if outcome.stopped else 0


def _default_run(run: Path, resume: str) -> Path:
    """runs/PRESET, or the next free runs/PRESET-N for a run that must not go on from another."""
    names = itertools.chain([run.name], (f"{run.name}-{n}" for n in itertools.count(2)))
    runs = (run.with_name(name) for name in names)
    return next(one for one in runs if resume != "never" or not checkpoints(one))
