"""Signs of life: a rank that stops or hangs is named, everybody's stacks are kept, the job ends.

Each rank writes a line into <run>/ranks/ every few seconds, from a thread of its own: who it is,
and in which phase of which step its loop is. The same thread reads the others' lines. One that does
not change: that process is stopped, gone, or its machine is. Lines that change while no loop gets
on: the rank that is furthest behind holds up the rest.

A rank waits for the others inside a collective, where no signal handler and no exception reaches
it; so the thread ends the process. torchrun then restarts all ranks from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from trainer.distributed.world import World
from trainer.metrics.metrics import RunEvent, report_rank_failure

RANKS: Final = "ranks"
STACKS: Final = "stacks"
_LINE_BYTES: Final = 512
_PHASES: Final = ("data", "gradient")  # of a step, in order; any other may take its time
_CONDITIONS: Final = {"": "gone", "Z": "gone", "T": "stopped", "D": "waiting for a device"}


@dataclass(kw_only=True)
class Heartbeat:
    """One rank's line."""

    rank: int
    pid: int
    host: str
    count: int = 0
    step: int = 0
    doing: str = "start"

    @property
    def progress(self) -> tuple[int, int]:
        """How far its loop is."""
        return self.step, _PHASES.index(self.doing) if self.doing in _PHASES else len(_PHASES)

    @property
    def condition(self) -> str:
        """The state of the process, if it is one of this machine."""
        if self.host != socket.gethostname():
            return "another machine"
        return _CONDITIONS.get(_state_and_parent(self.pid)[0], "alive")


class Watchdog:
    """What a rank's loop does, written for the others by a thread that reads theirs."""

    def __init__(self, run: Path, world: World, timeout_s: float) -> None:
        self._run, self._world, self._timeout_s = run, world, timeout_s
        self._period_s = min(5.0, timeout_s / 8)
        self._own = Heartbeat(rank=world.rank, pid=os.getpid(), host=socket.gethostname())
        self._first_step = 0
        self._moved_at = time.monotonic()
        self._seen: dict[int, tuple[Heartbeat, float]] = {}
        self._ending = threading.Event()
        self._handle = os.open(self._path(world.rank), os.O_WRONLY | os.O_CREAT, 0o644)

    def mark(self, step: int, doing: str) -> None:
        """The loop now does this, in this step."""
        self._first_step = self._first_step or step
        self._own.step, self._own.doing = step, doing
        self._moved_at = time.monotonic()

    def run(self) -> None:
        """Write and read lines until the run ends."""
        self._write()  # a rank that stops before its second line is missed too
        woke = time.monotonic()
        while not self._ending.wait(self._period_s):
            slept_s, woke = time.monotonic() - woke, time.monotonic()
            if slept_s > 3 * self._period_s:  # suspended itself: nobody else is to blame
                self._forgive(slept_s - self._period_s)
            self._write()
            self._check()

    def _forgive(self, seconds: float) -> None:
        """Leave time in which this process did not run out of every account."""
        self._moved_at += seconds
        self._seen = {rank: (beat, since + seconds) for rank, (beat, since) in self._seen.items()}

    def end(self, thread: threading.Thread) -> None:
        """End the thread, if it runs; a rank that has left in order is not missed."""
        self._ending.set()
        if thread.is_alive():
            thread.join()
        self._own.doing = "left"
        self._write()
        os.close(self._handle)

    def _write(self) -> None:
        self._own.count += 1
        line = json.dumps(asdict(self._own)).encode().ljust(_LINE_BYTES)
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, line, 0)  # in place: a full disk has room for that

    def _check(self) -> None:
        now, own = time.monotonic(), self._own
        for rank in range(self._world.world_size):
            with contextlib.suppress(OSError, ValueError):
                beat = Heartbeat(**json.loads(self._path(rank).read_bytes()))
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = (beat, now)
        silent = [(beat, now - since) for beat, since in self._seen.values()
                  if beat.rank != own.rank and beat.doing != "left"]  # fmt: skip
        lost = [(beat, silent_s) for beat, silent_s in silent if silent_s > self._timeout_s]
        reporter = min(set(range(self._world.world_size)) - {beat.rank for beat, _ in lost})
        for beat, silent_s in lost:
            text = (
                f"rank {beat.rank} (process {beat.pid} on {beat.host}, {beat.condition}) has shown "
                f"no sign of life for {silent_s:.0f} s; rank {own.rank} waits for it in step "
                f"{own.step}"
            )
            facts = {"lost": beat.rank, "step": own.step, "silent_s": round(silent_s, 1)}
            self._report(reporter, text, **facts)
        if lost:
            self._end_process([beat for beat, _ in lost])
        in_step = own.doing in _PHASES and own.step > self._first_step
        patience_s = self._timeout_s + 2 * self._period_s  # a rank that is lost is named first
        if in_step and now - self._moved_at > patience_s:
            self._report_who_is_behind(now - self._moved_at)
            self._end_process([])

    def _report_who_is_behind(self, waited_s: float) -> None:
        beats = [beat for beat, _ in self._seen.values()]
        least = min(beat.progress for beat in beats)
        behind = [beat for beat in beats if beat.progress == least]
        who = f"rank {' and '.join(str(beat.rank) for beat in behind)} holds up the others"
        if len(behind) == len(beats):
            who = "all ranks wait for each other" if beats[1:] else "the loop makes no progress"
            if len(hosts := sorted({beat.host for beat in beats})) > 1:
                who += f" ({' and '.join(hosts)}: see whether they reach each other)"
        text = f"{who}, since {waited_s:.0f} s: step {behind[0].step}, {behind[0].doing}"
        self._report(0, text, lost=behind[0].rank, step=behind[0].step)

    def _report(self, reporter: int, text: str, **facts: object) -> None:
        """Report it, once for all living ranks."""
        if self._world.rank == reporter:
            text = f"! {text}; stacks are in {self._run / STACKS}"
            report_rank_failure(self._run, text, RunEvent.HUNG, **facts)

    def _end_process(self, lost: list[Heartbeat]) -> None:
        """Keep this process's stacks, end lost neighbours (SIGTERM does not end them), and end."""
        folder = self._run / STACKS
        folder.mkdir(exist_ok=True)
        with (folder / f"rank-{self._world.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        for beat in lost:
            here = beat.host == self._own.host
            if here and _state_and_parent(beat.pid)[1] == str(os.getppid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
        time.sleep(min(1.0, self._period_s))  # the others keep their stacks too
        os._exit(1)  # the main thread may never come back from where it is

    def _path(self, rank: int) -> Path:
        return self._run / RANKS / f"{rank}.json"


@contextlib.contextmanager
def watch_ranks(run: Path, world: World, timeout_s: float) -> Iterator[Watchdog]:
    """A watchdog that runs until the block ends; with `timeout_s=0` it only takes marks."""

    def prepare() -> None:
        (run / RANKS).mkdir(parents=True, exist_ok=True)
        for path in (run / RANKS).glob("*.json"):
            path.unlink()

    world.on_main(prepare)  # what another job's ranks have left would be taken for ours
    watchdog = Watchdog(run, world, timeout_s)
    thread = threading.Thread(target=watchdog.run, name="heartbeat", daemon=True)
    if timeout_s:
        thread.start()
    try:
        yield watchdog
    finally:
        watchdog.end(thread)


def _state_and_parent(pid: int) -> list[str]:
    """State and parent of a process of this machine; empty if it is gone or cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ["", ""]
