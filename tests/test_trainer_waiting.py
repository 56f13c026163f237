"""The processor never waits for the device: a step's numbers are read a step later."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.faults.guard import Guard
from trainer.metrics.metrics_logger import PendingMetrics, StepMetrics
from trainer.session import network as parallel
from trainer.session.save import CheckpointSaver
from trainer.train import train
from trainer_samples import small_plan

pytestmark = pytest.mark.usefixtures("one_thread")


HOST_READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__",
              "__index__", "__array__"}  # fmt: skip
COPIES = {"tensor", "as_tensor", "from_numpy"}
ALLOWED = {
    "to_device",  # from pinned memory
    "PendingMetrics.__init__",  # into pinned memory
    "PendingMetrics.read",  # a step later
}


OURS = {Path(__file__).parents[1] / name for name in ("trainer", "model", "tests")}


class HostTraffic(TorchFunctionMode):
    """Records from where a tensor's value was asked for, or was carried between host and device.

    On the CPU both sides are one, so it is the asking that is looked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        targets = (*args[1:], *options.values())
        # the library's own .to() gathers what may be on several devices
        moved = name == "to" and is_ours(sys._getframe(1)) and any(map(is_device, targets))
        if moved or name in HOST_READS or name in COPIES:
            self.places.add(place())
        return func(*args, **options)


class InnerReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operator in which every read of a single number ends, inside the library too."""

    def __init__(self, places: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.places.add(place())
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The function of the innermost frame that is the project's."""
    frame = sys._getframe(2)
    while not is_ours(frame):
        if frame.f_back is None:
            return "?"
        frame = frame.f_back
    return frame.f_code.co_qualname


def is_ours(frame: FrameType) -> bool:
    return not OURS.isdisjoint(Path(frame.f_code.co_filename).parents)


def is_device(target: object) -> bool:
    return isinstance(target, str | torch.device)


def host_traffic(shards: Path, run: Path, patch: pytest.MonkeyPatch) -> set[str]:
    """The places of all host traffic between the start of the second step and the end."""
    traffic, steps = HostTraffic(), ExitStack()
    reseed, checkpoint = parallel.reseed_attention_dropout, CheckpointSaver.checkpoint

    def begin(config: Any, step: int, micro_step: int, rank: int) -> None:
        if (step, micro_step) == (1, 0):
            steps.enter_context(traffic)
            steps.enter_context(InnerReads(traffic.places))
        reseed(config, step, micro_step, rank)

    def end(saver: CheckpointSaver, **options: Any) -> None:
        steps.close()
        checkpoint(saver, **options)

    patch.setattr("trainer.session.network.reseed_attention_dropout", begin)
    patch.setattr(CheckpointSaver, "checkpoint", end)
    # the loader handles host tensors in a process of its own: what is seen here is on the device
    train(small_plan(shards, loader__num_workers=1, micro_batch_size=4, max_steps=4), run)
    return traffic.places


def test_the_loop_reads_nothing_from_the_device_but_a_step_late(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host_traffic(shards, tmp_path, monkeypatch) == ALLOWED


def test_a_step_is_read_when_the_next_is_under_way(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    make, read = PendingMetrics.__init__, PendingMetrics.read

    def made(pending: PendingMetrics, *args: Any, **logged: Any) -> None:
        order.append("made")
        make(pending, *args, **logged)

    def looked_at(pending: PendingMetrics) -> StepMetrics:
        order.append("read")
        return read(pending)

    monkeypatch.setattr(PendingMetrics, "__init__", made)
    monkeypatch.setattr(PendingMetrics, "read", looked_at)
    train(small_plan(shards, max_steps=4), tmp_path)
    assert order == ["made", *["made", "read"] * 3, "read"]


@pytest.mark.parametrize(
    "read",
    [float, bool, Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero,
     lambda norm: norm.to("cpu"), lambda norm: torch.tensor(1.0), lambda norm: range(5)[norm.int()],
     lambda norm: torch.nn.utils.clip_grad_norm_([norm], 1.0, error_if_nonfinite=True)],
)  # fmt: skip
def test_each_way_to_wait_is_noticed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Tensor], Any]
) -> None:
    should_skip = Guard.should_skip

    def peek(guard: Guard, norm: Tensor, flagged: Tensor) -> Tensor:
        read(norm)
        return should_skip(guard, norm, flagged)

    monkeypatch.setattr(Guard, "should_skip", peek)
    seen = host_traffic(shards, tmp_path, monkeypatch) - ALLOWED
    ours = ("test_each_way_to_wait_is_noticed.", "HostTraffic.", "<lambda>")
    assert seen and all(place.startswith(ours) for place in seen)
