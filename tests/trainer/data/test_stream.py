"""The stream's guarantees, each with a test."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.helpers import Helper
from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.store.codecs.bf16 import Bf16, decode_on_device
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data import reading
from skipcoder.trainer.data import stream as module
from skipcoder.trainer.data.batch import Batch, Column
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.stream import ActivationStream
from tests.conftest import CONTEXT, UNIT_ROWS

GOLDEN = [812, 1661, 521, 810, 1655, 160, 289, 1656, 182, 804]
EVERYTHING = TokenFilter(first_positions=0, special_tokens=False)


def open_stream(store: ActivationStore, batch_tokens: int = 100, **options: Any) -> ActivationStream:
    return ActivationStream(
        store, **{"hookpoint": "layers.1.mlp", "batch_tokens": batch_tokens, "pool_chunks": 5, **options}
    )


def positions(batches: list[Batch]) -> list[int]:
    return torch.cat([b.position for b in batches]).tolist()


@pytest.mark.parametrize("batch_tokens", [1, 64, 100, 1984])
@pytest.mark.parametrize("pool_chunks", [1, 5, 1000])
def test_every_token_exactly_once_an_epoch(store: ActivationStore, batch_tokens: int, pool_chunks: int) -> None:
    batches = list(open_stream(store, batch_tokens, pool_chunks=pool_chunks, epochs=1, filter=EVERYTHING))
    wanted = [p for unit in store.split("train") for p in range(*store.unit_range(unit))]
    assert sorted(positions(batches)) == wanted
    assert {len(b.x) for b in batches[:-1]} <= {batch_tokens}
    assert positions(batches) != wanted


def test_held_out_units_never_come_in_training(store: ActivationStore) -> None:
    seen = positions(list(open_stream(store, epochs=2, filter=EVERYTHING)))
    for split in ("validation", "test"):
        held_out = [range(*store.unit_range(unit)) for unit in store.split(split)]
        assert not [p for p in seen if any(p in span for span in held_out)]
        rest = positions(list(open_stream(store, split=split, epochs=1, filter=EVERYTHING)))
        assert sorted(rest) == [p for span in held_out for p in span]


def test_pairs_belong_to_their_position(store: ActivationStore) -> None:
    n = store.rows * CONTEXT
    index = store.read("index", 0, n).astype(np.int64)
    x, y = (store.activations("layers.1.mlp", side, 0, n).float() for side in ("input", "output"))
    place = torch.empty(n, dtype=torch.long)
    place[torch.from_numpy(index)] = torch.arange(n)
    for batch in open_stream(store, epochs=1):
        assert torch.equal(batch.x, x[place[batch.position]])
        assert torch.equal(batch.y, y[place[batch.position]])


def test_filter(store: ActivationStore) -> None:
    tokens = np.concatenate([store.tokens(u) for u in store.units]).ravel()
    special = store.attrs["special_tokens"]
    for first, drop in itertools.product((0, 1, 3), (False, True)):
        seen = positions(list(open_stream(store, epochs=1, filter=TokenFilter(first, drop))))
        wanted = [
            p
            for unit in store.split("train")
            for p in range(*store.unit_range(unit))
            if p % CONTEXT >= first and not (drop and tokens[p] in special)
        ]
        assert sorted(seen) == wanted
    with pytest.raises(UserError, match="filter leaves no token"):
        next(iter(open_stream(store, filter=TokenFilter(CONTEXT))))


@pytest.mark.parametrize("batch_tokens", [100, 64])
@pytest.mark.parametrize("stop_after", [1, 7, 19, 20, 31, 33])
def test_resume_goes_on_exactly_without_replay(
    store: ActivationStore, stop_after: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at an epoch's end, after a short batch (100: 20 batches an epoch) and after a full one (64: 31)."""
    whole = open_stream(store, batch_tokens, filter=EVERYTHING)
    wanted = list(itertools.islice(whole, 45))
    first = open_stream(store, batch_tokens, filter=EVERYTHING)
    list(itertools.islice(first, stop_after))
    state = first.state_dict()
    second = open_stream(store, batch_tokens, filter=EVERYTHING)
    second.load_state_dict(state)
    monkeypatch.setattr(module, "KEEP_BYTES", 0)
    got = list(itertools.islice(second, 45 - stop_after))
    for a, b in zip(got, wanted[stop_after:], strict=True):
        assert torch.equal(a.position, b.position) and torch.equal(a.x, b.x)
    assert second.state_dict() == whole.state_dict()


def test_state_of_another_layout_is_refused(store: ActivationStore) -> None:
    state = open_stream(store).state_dict()
    with pytest.raises(UserError, match="has changed since this run was saved"):
        open_stream(store, seed=1).load_state_dict(state)


def test_order_depends_on_seed_and_epoch_alone(store: ActivationStore) -> None:
    def order(**options: Any) -> list[int]:
        return positions(list(open_stream(store, epochs=2, **options)))

    assert order() == order()
    assert order() != order(seed=1)
    half = len(order()) // 2
    assert order()[:half] != order()[half:]
    assert order() == order(batch_tokens=37)  # batches only cut it


def test_hookpoints_come_aligned(store: ActivationStore) -> None:
    """The same tokens of both, each as it comes alone."""
    names = ["layers.2.mlp", "layers.0.mlp"]
    both = list(open_stream(store, hookpoint=names, epochs=1))
    for name in names:
        alone = list(open_stream(store, hookpoint=name, epochs=1))
        for batch, single in zip(both, alone, strict=True):
            assert torch.equal(batch.position, single.position)
            assert torch.equal(batch.columns[Column(name, "input")], single.x)
            assert torch.equal(batch.columns[Column(name, "output")], single.y)
    with pytest.raises(UserError, match=r"no hookpoint 'layers.9.mlp'"):
        open_stream(store, hookpoint=["layers.0.mlp", "layers.9.mlp"])


def test_sides_that_nobody_needs_are_not_read(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the order is the same without them."""
    names = ["layers.0.mlp", "layers.2.mlp"]
    wanted = [Column("layers.2.mlp", "output")]
    everything = list(open_stream(store, hookpoint=names, epochs=1))
    read: set[Any] = set()
    real = ActivationStore.activations

    def activations(self: ActivationStore, *args: Any, **options: Any) -> Any:
        read.add(args[:2])
        return real(self, *args, **options)

    monkeypatch.setattr(ActivationStore, "activations", activations)
    for batch, whole in zip(open_stream(store, hookpoint=names, epochs=1, columns=wanted), everything, strict=True):
        assert list(batch.columns) == wanted and torch.equal(batch.position, whole.position)
        assert torch.equal(batch.y, whole.columns[wanted[0]])
    assert read == set(wanted)


def test_golden_order(store: ActivationStore) -> None:
    """Pinned: another order would break the resumption of runs and the comparison of old with new ones. It may change
    only with the store's format version or with a reason in the changelog."""
    first = next(iter(open_stream(store, 10, filter=EVERYTHING)))
    assert first.position.tolist() == GOLDEN


def test_ranks_are_disjoint_and_complete(store: ActivationStore) -> None:
    whole = list(open_stream(store, epochs=1))
    ranks = [list(open_stream(store, epochs=1, rank=r, world_size=3)) for r in range(3)]
    for global_batch, *parts in zip(whole, *ranks, strict=True):
        assert sorted(positions(parts)) == sorted(global_batch.position.tolist())
        assert torch.equal(parts[1].position, global_batch.position[1::3])
        assert {p.tokens for p in parts} == {global_batch.tokens} == {len(global_batch.x)}


def test_reader_errors_surface_and_threads_end(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.read

    def read(name: str, start: int, stop: int, out: Any = None) -> np.ndarray:
        if name.startswith("layers") and start > 900:
            raise UserError(f"{name}: rows {start} damaged")
        return real(name, start, stop, out)

    monkeypatch.setattr(store, "read", read)
    with pytest.raises(UserError, match=r"layers.1.mlp/input: rows \d+ damaged"):
        list(open_stream(store, epochs=1))
    assert not [t for t in threading.enumerate() if t.name == "activation-stream"]


def test_batch_larger_than_the_split(store: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"train.batch_tokens=99999 is more than the 1,856 training tokens"):
        open_stream(store, 99999)


def test_device_and_dtype(store: ActivationStore) -> None:
    batch = next(iter(open_stream(store, dtype=torch.bfloat16)))
    assert batch.x.dtype == batch.y.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("kept", [False, True])
def test_the_way_to_a_gpu_gives_the_same_batches(
    device: str,
    codec: str,
    kept: bool,
    cache_config: Callable[..., CacheConfig],
    capture_here: Callable[[CacheConfig], ActivationStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codes through memory, several chunks decoded together by torch alone; where there is no GPU, on a CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=35 * UNIT_ROWS - 1, codec=codec))
    monkeypatch.setattr(module, "KEEP_BYTES", 2**30 if kept else -1)

    plain = list(ActivationStream(store, "layers.1.mlp", 100, pool_chunks=19, epochs=2))
    if device == "cpu":
        monkeypatch.setattr(Bf16, "decode", staticmethod(decode_on_device))
    stream = ActivationStream(store, "layers.1.mlp", 100, pool_chunks=19, epochs=2, device=device, readers=3)
    stream._pool.through_memory = True
    for a, b in zip(plain, stream, strict=True):
        assert torch.equal(a.x, b.x.cpu()) and torch.equal(a.y, b.y.cpu()) and torch.equal(a.position, b.position)


@pytest.mark.parametrize("apart", [False, True])
def test_on_the_way_to_a_gpu_damage_is_named_and_all_that_read_end(
    apart: bool,
    cache_config: Callable[..., CacheConfig],
    capture_here: Callable[[CacheConfig], ActivationStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    helpers: list[Helper] = []

    def start(*args: Any) -> Helper:
        helpers.append(Helper(*args))
        return helpers[-1]

    monkeypatch.setattr(reading, "Helper", start)
    monkeypatch.setattr(module, "KEEP_BYTES", -1 if apart else 2**30)
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=35 * UNIT_ROWS - 1, codec="int8"))
    options: dict[str, Any] = {"pool_chunks": 4, "epochs": 1, "readers": 2}
    stream = ActivationStream(store, "layers.1.mlp", 100, **options)
    stream._pool.through_memory = True
    next(batches := iter(stream))
    batches.close()

    shard = store.path / "layers.1.mlp" / "input" / "c" / "33" / "0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    stream = ActivationStream(ActivationStore.open(store.path), "layers.1.mlp", 100, **options)
    stream._pool.through_memory = True
    with pytest.raises(UserError, match=r"layers.1.mlp/input: rows \d+-\d+ \(unit 33\) .*checksum does not match"):
        list(stream)
    assert len(helpers) == (4 if apart else 0)
    assert all(helper._process.poll() is not None for helper in helpers)
    assert not [t for t in threading.enumerate() if t.name.startswith(("reader", "activation-stream"))]


@pytest.mark.parametrize("apart", [False, True])
def test_any_number_of_chunks_may_be_asked_for(apart: bool, store: ActivationStore) -> None:
    """More than a connection holds messages, twice, before the first is waited for."""
    count = 1500
    chunk = reading.Chunk(2, *store.unit_range(2))
    staging = reading.Staging(
        store, [Column("layers.1.mlp", side) for side in ("input", "output")], EVERYTHING, 2 * count
    )
    with reading.Readers(staging, 1, apart) as readers:
        waits = [readers.ask(first, [chunk] * count) for first in (0, count)]
        for wait in waits:
            wait()
        assert staging.keep.all()
        assert (staging.position == staging.position[0]).all()
