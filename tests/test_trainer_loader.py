"""Micro-batches: the right rows, in the right order, with the right targets."""

import os
import pickle
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from model.loss import IGNORED
from shards.errors import ShardError
from shards.reader import ShardReader
from shards_samples import make_source
from trainer.config.sections import LoaderConfig
from trainer.data.batches import HostBatch, MicroBatches, ReadFailure, StepRange, to_device
from trainer.data.loader import Loader
from trainer.data.mixture import BatchShape, DataOrder, Keys, Phase, dropout_keys
from trainer.errors import TrainingError
from trainer_samples import make_shards

CPU = torch.device("cpu")


def batches_of(
    shards: Path, shape: BatchShape, n_steps: int, *, rank: int = 0, first_index: int = 0
) -> MicroBatches:
    readers = {folder.name: ShardReader(folder) for folder in sorted(shards.iterdir())}
    rows = {name: reader.n_rows for name, reader in readers.items()}
    order = DataOrder(seed=5, rows=rows, phases=[Phase(0, dict.fromkeys(rows, 1))])
    steps = StepRange(first_index=first_index, n_steps=n_steps, shape=shape, rank=rank)
    return MicroBatches(order, readers, steps)


def gathered(batches: MicroBatches, indices: np.ndarray) -> HostBatch:
    located = batches._order.locate(indices)
    keys = dropout_keys(batches._order.seed, indices)
    return batches.gather(located.source.tolist(), located.row.tolist(), keys)


def tokens_of(loader: Loader, n: int) -> torch.Tensor:
    try:
        return torch.stack([loader.next().tokens for _ in range(n)])
    finally:
        loader.close()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(tmp_path: Path, num_workers: int) -> None:
    shards, shape = make_shards(tmp_path), BatchShape(8, 2, 1)
    config = LoaderConfig(num_workers=num_workers, prefetch=2)
    alone = Loader(batches_of(shards, shape, 3), LoaderConfig(num_workers=0), CPU, pad_id=0)
    shared = Loader(batches_of(shards, shape, 3), config, CPU, pad_id=0)
    assert torch.equal(tokens_of(alone, 12), tokens_of(shared, 12))
    assert shared.waited_s > 0


def test_ranks_and_micro_batches_read_the_same_samples(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    full = next(iter(batches_of(shards, BatchShape(8, 8, 1), 1, first_index=64)))
    assert isinstance(full, HostBatch)
    parts = [
        batch
        for rank in range(2)
        for batch in batches_of(shards, BatchShape(8, 2, 2), 1, rank=rank, first_index=64)
    ]
    tokens = torch.cat([part.tokens for part in parts if isinstance(part, HostBatch)])
    keys = torch.cat([part.dropout_key for part in parts if isinstance(part, HostBatch)])
    rows = {tuple(row) for row in torch.cat([full.tokens.int(), full.dropout_key], 1).tolist()}
    assert {tuple(row) for row in torch.cat([tokens.int(), keys], 1).tolist()} == rows


def test_a_loader_that_starts_later_goes_on_as_the_first_would(tmp_path: Path) -> None:
    shards, shape = make_shards(tmp_path), BatchShape(4, 2, 1)
    config = LoaderConfig(num_workers=0)
    full = tokens_of(Loader(batches_of(shards, shape, 6), config, CPU, 0), 12)
    later = tokens_of(Loader(batches_of(shards, shape, 2, first_index=16), config, CPU, 0), 4)
    assert torch.equal(full[8:], later)


def test_rows_are_those_that_the_order_names(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    batches = batches_of(shards, BatchShape(8, 8, 1), 1)
    indices = np.arange(100, 120)
    located = batches._order.locate(indices)
    host = gathered(batches, indices)
    assert host.tokens.dtype == torch.uint16
    for place in range(20):
        name = batches._order.sources[located.source[place]]
        rows, _ = ShardReader(shards / name).rows(located.row[place : place + 1])
        assert np.array_equal(host.tokens[place].numpy(), rows[0])
    assert np.array_equal(host.dropout_key.numpy(), dropout_keys(5, indices))
    assert host.is_target is None


def test_targets_are_the_row_shifted_left_without_padding() -> None:
    tokens = torch.tensor([[1, 7, 8, 2, 0, 0], [1, 9, 9, 9, 9, 9]], dtype=torch.uint16)
    batch = to_device(HostBatch(tokens, None, torch.zeros(2, 2, dtype=torch.int32)), CPU, pad_id=0)
    assert batch.tokens.dtype == torch.int64
    assert batch.targets.tolist() == [
        [7, 8, 2, IGNORED, IGNORED, IGNORED],
        [9, 9, 9, 9, 9, IGNORED],
    ]


def test_the_loss_mask_names_which_tokens_are_targets() -> None:
    tokens = torch.tensor([[1, 7, 8, 9, 2, 0]], dtype=torch.uint16)
    is_target = torch.tensor([[True, False, True, True, True, True]])
    host = HostBatch(tokens, is_target, torch.zeros(1, 2, dtype=torch.int32))
    targets = to_device(host, CPU, pad_id=0).targets
    assert targets.tolist() == [[IGNORED, 8, 9, 2, IGNORED, IGNORED]]


def test_a_masked_source_with_a_plain_one(tmp_path: Path) -> None:
    make_source(tmp_path / "plain", n_rows=20, seq_len=32)
    make_source(tmp_path / "chat", n_rows=20, seq_len=32, masked=True)
    batches = batches_of(tmp_path, BatchShape(8, 8, 1), 1)
    indices = np.arange(8)
    located = batches._order.locate(indices)
    host = gathered(batches, indices)
    assert host.is_target is not None
    for place in range(8):
        name = batches._order.sources[located.source[place]]
        if name == "plain":
            assert host.is_target[place].all()
        else:
            _, masks = ShardReader(tmp_path / name).rows(located.row[place : place + 1])
            assert masks is not None
            bits = np.unpackbits(masks[0], bitorder="little").astype(bool)
            assert np.array_equal(host.is_target[place].numpy(), bits)


def test_ids_above_65535_arrive(tmp_path: Path) -> None:
    make_source(tmp_path / "wide", n_rows=20, seq_len=32, vocab_size=100_000)
    loader = Loader(
        batches_of(tmp_path, BatchShape(8, 8, 1), 1), LoaderConfig(num_workers=0), CPU, 0
    )
    assert loader.next().tokens.max() > 65_535


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_is_named_and_never_trained_on(tmp_path: Path, num_workers: int) -> None:
    shards = make_shards(tmp_path, fineweb=8)
    shard = shards / "fineweb" / "00000-000.npy"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    config = LoaderConfig(num_workers=num_workers)
    loader = Loader(batches_of(shards, BatchShape(8, 1, 1), 1), config, CPU, pad_id=0)
    batches = [loader.next() for _ in range(8)]
    loader.close()
    assert isinstance(loader.damage, ShardError)
    message = str(loader.damage)
    assert re.match(r"fineweb: .*00000-000\.npy row 3 is damaged", message) and "\n" not in message
    has_targets = [bool((batch.targets != IGNORED).any()) for batch in batches]
    n_good = has_targets.index(False)
    assert has_targets == [True] * n_good + [False] * (8 - n_good)


def test_workers_that_die_are_replaced_without_a_trace(tmp_path: Path) -> None:
    shards, logged = make_shards(tmp_path), list[str]()
    shape = BatchShape(8, 2, 1)
    full = tokens_of(Loader(batches_of(shards, shape, 5), LoaderConfig(num_workers=0), CPU, 0), 20)
    config = LoaderConfig(num_workers=2, prefetch=1)
    loader = Loader(batches_of(shards, shape, 5), config, CPU, 0, logged.append)
    tokens = []
    for number in range(20):
        if number == 3:
            os.kill(loader.worker_pids()[number % 2], signal.SIGKILL)
        tokens.append(loader.next().tokens)
    loader.close()
    assert torch.equal(torch.stack(tokens), full)
    assert len(logged) == 1 and "new ones continue from the same row" in logged[0]


def deadly_loader(tmp_path: Path) -> Loader:
    class Deadly(MicroBatches):
        def gather(self, sources: list[int], rows: list[int], keys: Keys) -> HostBatch:
            os._exit(9)

    batches = batches_of(make_shards(tmp_path), BatchShape(8, 8, 1), 1)
    batches.__class__ = Deadly
    return Loader(batches, LoaderConfig(num_workers=1), CPU, pad_id=0)


def test_a_loader_leaves_no_thread_behind_that_waits_for_dead_workers(tmp_path: Path) -> None:
    loader = deadly_loader(tmp_path)
    assert "loader" in {thread.name for thread in threading.enumerate()}
    loader.close()
    assert "loader" not in {thread.name for thread in threading.enumerate()}


def test_workers_that_always_die_are_an_error_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.loader._LIVES", 1)  # torch takes five seconds to notice each

    loader = deadly_loader(tmp_path)
    message = r"1 times a loader worker died .* the last checkpoint is intact"
    with pytest.raises(TrainingError, match=message):
        loader.next()
    loader.close()


def test_a_disk_that_fails_is_a_failure_that_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: ShardReader, *args: object) -> None:
        raise OSError(5, "Input/output error")

    batches = batches_of(make_shards(tmp_path), BatchShape(8, 8, 1), 1)
    monkeypatch.setattr(ShardReader, "read", fails)
    failure = next(iter(batches))
    assert isinstance(failure, ReadFailure)
    assert str(failure.error) == "a shard cannot be read: [Errno 5] Input/output error"


def test_an_empty_micro_batch_is_like_any_other_but_has_no_target(tmp_path: Path) -> None:
    batches = batches_of(make_shards(tmp_path), BatchShape(8, 4, 1), 1)
    empty, full = batches.empty(), next(iter(batches))
    assert isinstance(full, HostBatch)
    for part, other in ((empty.tokens, full.tokens), (empty.dropout_key, full.dropout_key)):
        assert (part.shape, part.dtype) == (other.shape, other.dtype)
    batch = to_device(empty, CPU, pad_id=7)
    assert (batch.targets == IGNORED).all() and batch.targets.shape == full.tokens.shape
    assert not batch.tokens.any() and not batch.dropout_key.any()


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False]])])
def test_a_batch_survives_the_workers_pipe(mask: torch.Tensor | None) -> None:
    host = HostBatch(torch.tensor([[7, 8]], dtype=torch.uint16), mask, torch.tensor([[1, -2]]))
    back = pickle.loads(pickle.dumps(host))
    assert torch.equal(back.tokens, host.tokens) and torch.equal(back.dropout_key, host.dropout_key)
    assert back.is_target is None if mask is None else torch.equal(back.is_target, mask)
