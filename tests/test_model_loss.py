"""Chunked linear cross-entropy against the textbook in fp64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from model.loss import linear_cross_entropy

N, V, D = 37, 101, 24


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def textbook(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return loss + z_loss * (logits.logsumexp(-1).square() * (targets != -100)).sum()


def loss_and_grads(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    loss = function(hidden, weight, targets, **options)
    return (loss, *torch.autograd.grad(3 * loss, (hidden, weight)))


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 1000, None])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradients_for_any_chunk(chunk_rows: int | None, z_loss: float) -> None:
    expected = loss_and_grads(textbook, *inputs(torch.float64), z_loss=z_loss)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        got = loss_and_grads(
            linear_cross_entropy, *inputs(dtype), z_loss=z_loss, chunk_rows=chunk_rows
        )
        for part, expected_part in zip(got, expected, strict=True):
            assert part.dtype == dtype
            error = (part.double() - expected_part).norm() / expected_part.norm()
            assert error < tolerance


def test_bf16_autocast_is_as_near_as_bf16_products_allow() -> None:
    expected = loss_and_grads(textbook, *inputs(torch.float64))
    for chunk_rows in (5, 37):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden, weight, targets = inputs()
            loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)
        grads = torch.autograd.grad(3 * loss, (hidden, weight))
        for part, expected_part in zip((loss, *grads), expected, strict=True):
            assert part.dtype == torch.float32
            assert (part.double() - expected_part).norm() / expected_part.norm() < 0.01


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert loss.item() == pytest.approx(textbook(hidden * 1e4, weight, targets).item(), rel=1e-5)


def test_nothing_but_ignored_targets_is_zero() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0
    assert not any(grad.any() for grad in grads)


def test_without_gradients_none_are_made() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(textbook(hidden, weight, targets).item(), rel=1e-6)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple) else (out,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return out


def test_logits_are_never_whole() -> None:
    hidden = torch.randn(400, 4, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    targets = torch.zeros(400, dtype=torch.int64)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        torch.autograd.backward(linear_cross_entropy(hidden, weight, targets, chunk_rows=8))
    assert largest.elements == 400 * 4  # hidden; the logits would be 400 * 50


def peak_bytes(function: Callable[..., Tensor], *args: Any, **options: Any) -> int:
    """What forward and backward hold at once at most, beyond what was there before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        torch.autograd.backward(function(*args, **options))
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), int(event.nbytes())) for event in events if event.name() == "[memory]"
    ]
    return max(itertools.accumulate(n_bytes for _, n_bytes in sorted(changes)))


def test_peak_memory_is_the_gradients_and_a_few_chunks() -> None:
    rows, vocab, width, chunk_rows = 512, 4096, 32, 16
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    logits, chunk = 4 * rows * vocab, 4 * chunk_rows * vocab
    gradients = 4 * (rows + vocab) * width
    peak = peak_bytes(linear_cross_entropy, hidden, weight, targets, chunk_rows=chunk_rows)
    assert gradients < peak <= 2 * gradients + 3 * chunk < logits / 4
    assert peak_bytes(textbook, hidden, weight, targets) > 2 * logits


def test_the_operator_passes_torch_s_own_checks() -> None:
    hidden, weight, targets = inputs(torch.float64)
    arguments = (hidden, weight, targets, 0.01, 7, torch.float64, True, False)
    operator = torch.ops.model_loss.linear_cross_entropy.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_first_class_is_a_target_like_any_other() -> None:
    hidden, weight, targets = inputs(torch.float64)
    targets = torch.where(targets == -100, targets, targets % 2)
    expected = loss_and_grads(textbook, hidden, weight, targets)
    for part, other in zip(
        loss_and_grads(linear_cross_entropy, hidden, weight, targets), expected, strict=True
    ):
        torch.testing.assert_close(part, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("elements", "rows"), [(8 * 50, 8), (10, 1)])
def test_a_chunk_has_as_many_logits_as_the_device_is_given(
    monkeypatch: pytest.MonkeyPatch, elements: int, rows: int
) -> None:
    """One row at least."""
    shapes, measure = [], model.loss._measure

    def noted(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
        shapes.append(tuple(logits.shape))
        return measure(logits, *others)

    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(model.loss, "_measure", noted)
    monkeypatch.delattr(model.loss, "_compiled")  # not the default
    hidden, weight = torch.randn(40, 1), torch.randn(50, 1)
    linear_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.int64))
    assert shapes == [(rows, 50)] * (40 // rows)


def test_gradients_that_nobody_wants_take_no_memory() -> None:
    hidden, weight, targets = (part.detach() for part in inputs())
    operator = torch.ops.model_loss.linear_cross_entropy.default
    _, *gradients = operator(hidden, weight, targets, 0.0, 7, torch.float32, False, False)
    assert [gradient.numel() for gradient in gradients] == [0, 0]


def test_an_input_in_another_precision_than_autocast_s_keeps_its_own() -> None:
    hidden, weight, targets = inputs(torch.float16)
    expected = loss_and_grads(linear_cross_entropy, hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_grads(linear_cross_entropy, hidden, weight, targets)
    assert all(map(torch.equal, got, expected))


def test_bf16_chunks_are_summed_in_fp32() -> None:
    hidden, weight, targets = (part.detach() for part in inputs(torch.bfloat16))
    operator = torch.ops.model_loss.linear_cross_entropy.default
    parts = operator(hidden, weight, targets, 0.0, 1, torch.bfloat16, True, False)
    assert [part.dtype for part in parts] == [torch.float32, torch.bfloat16, torch.float32]
