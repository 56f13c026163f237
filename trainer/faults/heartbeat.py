"""Signs of life: a rank that stops or hangs is named, everybody's stacks are kept, the job ends.

Each rank writes a line into <run>/ranks/ every few seconds, from a thread of its own: who it is,
and what its loop is doing since when. The same thread reads the others' lines. Two things can be
seen that way. A line that does not change: that process is stopped, gone, or its machine is. And
lines that change while no loop gets on: then the rank that is furthest behind holds up the rest.

A rank waits for the others inside a collective, where no signal handler and no exception reaches
it; so the thread ends the process. torchrun then starts all ranks again, from the last checkpoint.
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
from trainer.faults.faults import alarm

RANKS: Final = "ranks"
STACKS: Final = "stacks"
_LINE_BYTES: Final = 512
_PHASES: Final = ("data", "gradient")  # of a step, in order; anything else may take its time


@dataclass(kw_only=True)
class Beat:
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


class Heart:
    """What a rank's loop says of itself, told to the others by a thread."""

    def __init__(self, run: Path, world: World, timeout_s: float) -> None:
        self._run, self._world, self._timeout_s = run, world, timeout_s
        self._period_s = min(5.0, timeout_s / 8)
        self._own = Beat(rank=world.rank, pid=os.getpid(), host=socket.gethostname())
        self._first_step = 0
        self._moved_at = time.monotonic()
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._ending = threading.Event()
        self._handle = os.open(self._path(world.rank), os.O_WRONLY | os.O_CREAT, 0o644)

    def mark(self, step: int, doing: str) -> None:
        """The loop now does this, in this step."""
        self._first_step = self._first_step or step
        self._own.step, self._own.doing = step, doing
        self._moved_at = time.monotonic()

    def run(self) -> None:
        """Beat and look around until the run ends."""
        self._beat()  # a rank that stops before its second beat is missed too
        while not self._ending.wait(self._period_s):
            self._beat()
            self._look_around()

    def end(self, thread: threading.Thread | None) -> None:
        """Say goodbye: nobody waits for a rank that has left in order."""
        self._ending.set()
        if thread is not None:
            thread.join()
        self._own.doing = "left"
        self._beat()
        os.close(self._handle)

    def _beat(self) -> None:
        self._own.count += 1
        line = json.dumps(asdict(self._own)).encode().ljust(_LINE_BYTES)
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, line, 0)  # in place: a full disk has room for that

    def _look_around(self) -> None:
        now = time.monotonic()
        for rank in range(self._world.world_size):
            with contextlib.suppress(OSError, ValueError):
                beat = Beat(**json.loads(self._path(rank).read_bytes()))
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = (beat, now)
        others = [(beat, since) for rank, (beat, since) in self._seen.items()
                  if rank != self._world.rank and beat.doing != "left"]  # fmt: skip
        lost = [(beat, since) for beat, since in others if now - since > self._patience_s(beat)]
        if lost:
            for beat, since in lost:
                self._tell_lost(beat, now - since)
            self._leave({beat.rank for beat, _ in lost})
        held_up = self._own.doing in _PHASES and self._own.step > self._first_step
        patience_s = self._timeout_s + 2 * self._period_s  # a rank that is lost is named first
        if held_up and now - self._moved_at > patience_s:
            self._tell_held_up(now - self._moved_at)
            self._leave(set())

    def _patience_s(self, beat: Beat) -> float:
        gone = _condition(beat) in ("gone", "dead")
        return min(self._timeout_s, 2 * self._period_s) if gone else self._timeout_s

    def _tell_lost(self, beat: Beat, silent_s: float) -> None:
        text = (
            f"! rank {beat.rank} (process {beat.pid} on {beat.host}, {_condition(beat)}) has shown "
            f"no sign of life for {silent_s:.0f} s; rank {self._own.rank} waits for it in step "
            f"{self._own.step}"
        )
        facts = {"lost": beat.rank, "step": self._own.step, "silent_s": round(silent_s, 1)}
        self._alarm(text, {beat.rank}, **facts)

    def _tell_held_up(self, waited_s: float) -> None:
        beats = [beat for beat, _ in self._seen.values()]
        least = min(beat.progress for beat in beats)
        behind = [beat for beat in beats if beat.progress == least]
        if self._world.world_size == 1:
            who = "the loop stands still"
        elif len(behind) == len(beats):
            who = "all ranks wait for each other"
        else:
            who = f"rank {' and '.join(str(beat.rank) for beat in behind)} holds up the others"
        text = f"! {who}, since {waited_s:.0f} s: step {behind[0].step}, {behind[0].doing}"
        self._alarm(text, set(), lost=behind[0].rank, step=behind[0].step)

    def _alarm(self, text: str, silent: set[int], **facts: object) -> None:
        """Tell it, once for all living ranks."""
        living = [rank for rank in range(self._world.world_size) if rank not in silent]
        if self._world.rank == living[0]:
            alarm(self._run, f"{text}; stacks are in {self._run / STACKS}", "hung", **facts)

    def _leave(self, lost: set[int]) -> None:
        """Keep this process's stacks, end lost neighbours (SIGTERM does not end them), and end."""
        folder = self._run / STACKS
        folder.mkdir(exist_ok=True)
        with (folder / f"rank-{self._world.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        for rank in lost:
            beat = self._seen[rank][0]
            if beat.host == self._own.host and _parent(beat.pid) == os.getppid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
        time.sleep(min(1.0, self._period_s))  # the others keep their stacks too
        os._exit(1)  # the main thread may never come back from where it is

    def _path(self, rank: int) -> Path:
        return self._run / RANKS / f"{rank}.json"


@contextlib.contextmanager
def beating(run: Path, world: World, timeout_s: float) -> Iterator[Heart]:
    """A heart that beats until the block ends; with `timeout_s=0` one that only takes marks."""

    def prepare() -> None:
        (run / RANKS).mkdir(parents=True, exist_ok=True)
        for path in (run / RANKS).glob("*.json"):
            path.unlink()

    world.on_main(prepare)  # what another job's ranks have left would be taken for ours
    heart = Heart(run, world, timeout_s)
    thread = None
    if timeout_s:
        thread = threading.Thread(target=heart.run, name="heartbeat", daemon=True)
        thread.start()
    try:
        yield heart
    finally:
        heart.end(thread)


def _condition(beat: Beat) -> str:
    """What the system says of a process of this machine."""
    if beat.host != socket.gethostname():
        return "another machine"
    try:
        state = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped", "t": "traced", "Z": "dead", "D": "waiting for a device"}.get(
        state, "alive"
    )


def _parent(pid: int) -> int | None:
    """The parent of a process of this machine; None if it is gone or cannot be known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
