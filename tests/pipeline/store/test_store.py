"""The store: what is in it is what was captured, and damage never passes for data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from omegaconf import OmegaConf

from skipcoder.errors import UserError
from skipcoder.pipeline import cache
from skipcoder.pipeline.capture import worker
from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.store import commit, layout, writer
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments, pack, unpack
from tests.conftest import CONTEXT, D_MODEL, UNIT_ROWS, UNITS


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def copy(store: ActivationStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.path, tmp_path / "copy.zarr"))


def test_values_are_those_of_plain_hooks_looked_up_through_index(store: ActivationStore, tiny_model: Path) -> None:
    """Bit for bit in bf16, for the same micro-batches; every hookpoint, both sides, every token."""
    lm = model.load_causal_lm(ModelConfig(name="tiny", id=str(tiny_model)), "cpu")
    assert list(store.hookpoints) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    seen: dict[str, list[torch.Tensor]] = {}
    for name in store.hookpoints:
        lm.base_model.get_submodule(name).register_forward_hook(
            lambda _, args, out, n=name: (
                (
                    seen.setdefault(f"{n}/input", []).append(args[0].flatten(0, 1)),
                    seen.setdefault(f"{n}/output", []).append(out.flatten(0, 1)),
                )[:0]
                or None
            )
        )
    with torch.no_grad():
        for unit in store.units:
            for rows in torch.from_numpy(store.tokens(unit)).long().split(2):  # micro_batch_tokens = 2 rows
                lm(rows)
    index = store.read("index", 0, store.rows * CONTEXT).astype(np.int64)
    for name, parts in seen.items():
        hookpoint, side = name.split("/")
        stored = store.activations(hookpoint, side, 0, len(index))
        assert stored.shape == (len(index), D_MODEL)
        assert torch.equal(stored, torch.cat(parts)[index])


def test_index_is_a_permutation_inside_each_unit(store: ActivationStore) -> None:
    for unit in store.units:
        start, stop = store.unit_range(unit)
        index = store.read("index", start, stop)
        assert sorted(index) == list(range(start, stop))
        assert (index != np.arange(start, stop)).any()


def test_statistics_are_those_of_the_stored_values(store: ActivationStore) -> None:
    for split in ("train", "held_out"):
        spans = [store.unit_range(unit) for unit in store.split(split)]
        y = torch.cat([store.activations("layers.1.mlp", "output", *span) for span in spans]).double().numpy()
        index = np.concatenate([store.read("index", *span) for span in spans]).astype(np.int64)
        tokens = store.read("tokens", 0, store.rows).ravel()[index]
        first = index % CONTEXT == 0
        special = np.isin(tokens, store.attrs["special_tokens"]) & ~first
        assert special.any() or split == "held_out"  # so that the class is not tested on nothing
        for classes, values in (
            (commit.POSITIONS, y),
            (("other",), y[~first & ~special]),
            (("special", "other"), y[~first]),
        ):
            moments = store.moments("layers.1.mlp", "output", split, classes)
            assert moments.count == len(values)
            np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(moments.variance, values.var(0), rtol=1e-9)


def test_splits(store: ActivationStore) -> None:
    assert store.is_complete and len(store.units) == UNITS
    assert store.split("held_out") == [15, 31]
    assert store.chunk_rows == UNIT_ROWS * CONTEXT


def test_plain_zarr_reads_it(store: ActivationStore) -> None:
    """No skipcoder needed: bf16 bits are the upper half of a float32."""
    group = zarr.open_group(store.path, mode="r")
    bits = group["layers.1.mlp/output"][:5].astype("uint32") << 16
    mine = store.activations("layers.1.mlp", "output", 0, 5).float().numpy()
    np.testing.assert_array_equal(bits.view("float32"), mine)
    assert group["tokens"].shape == (UNITS * UNIT_ROWS, CONTEXT)


def test_flipped_byte_is_caught_and_named(copy: Path) -> None:
    shard = copy / "layers.1.mlp/output/c/3/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(bytes(content))
    store = ActivationStore.open(copy)
    with pytest.raises(UserError, match=r"layers.1.mlp/output.*unit 3.*00000003.json"):
        store.activations("layers.1.mlp", "output", *store.unit_range(3))


@pytest.mark.parametrize("cut", ["truncate", "remove"])
def test_truncated_or_missing_shard_is_caught_at_opening(copy: Path, cut: str) -> None:
    shard = copy / "layers.0.mlp/input/c/7/0"
    shard.unlink() if cut == "remove" else shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"layers.0.mlp/input/c/7/0: expected \d+ bytes, found"):
        ActivationStore.open(copy)


def test_lost_tokens_get_the_remedy_that_works(copy: Path) -> None:
    (copy / "tokens/c/7/0").unlink()
    with pytest.raises(UserError, match=r"tokens/c/7/0: expected .*; delete the store and capture anew"):
        ActivationStore.open(copy)


def test_uncommitted_units_do_not_exist(copy: Path) -> None:
    commit.withdraw(place_at(copy), 5)
    store = ActivationStore.open(copy)
    assert 5 not in store.units and not store.is_complete
    assert 5 not in store.split("train")


def test_recapturing_lost_units_gives_the_same_bytes(
    copy: Path, cache_config: Any, capture_here: Any, store: ActivationStore
) -> None:
    whole = files(copy)
    for unit in (0, 5, 32):
        commit.withdraw(place_at(copy), unit)
        (copy / f"layers.1.mlp/output/c/{unit}/0").unlink()
    (copy / "layers.2.mlp/output/c/5/0").write_bytes(b"torn")
    capture_here(cache_config(copy, ("layers.*.mlp",)))
    assert files(copy) == whole


def test_growing_equals_capturing_at_once(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    """The last unit was short (70 = 17 * 4 + 2 rows): it is withdrawn and written anew."""
    for rows in (70, 100):
        capture_here(cache_config(tmp_path / "grown.zarr", rows=rows))
    capture_here(cache_config(tmp_path / "whole.zarr", rows=100))
    assert files(tmp_path / "grown.zarr") == files(tmp_path / "whole.zarr")


def test_a_path_that_is_no_store_is_left_alone(tmp_path: Path, cache_config: Any) -> None:
    (tmp_path / "home").mkdir()
    for name in ("film.partial", ".x.1-1.partial"):
        (tmp_path / "home" / name).write_text("mine")
    with pytest.raises(UserError, match="is not an activation store"):
        cache.capture(cache_config(tmp_path / "home"))
    assert len(list((tmp_path / "home").iterdir())) == 2


def test_an_unfinished_layout_makes_room_for_another_capture(
    tmp_path: Path, cache_config: Any, capture_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while tokenising; then a mistake; then the right command."""

    class KilledError(Exception):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(cache, "rows_of", kill)
        capture_here(cache_config(tmp_path / "s.zarr", unit_rows=2))
    with pytest.raises(UserError, match="matches no module"):
        capture_here(cache_config(tmp_path / "s.zarr", ("no.such",)))
    capture_here(cache_config(tmp_path / "s.zarr"))
    (tmp_path / "fresh").mkdir()
    capture_here(cache_config(tmp_path / "fresh" / "s.zarr"))
    assert files(tmp_path / "s.zarr") == files(tmp_path / "fresh" / "s.zarr")


def test_a_record_of_a_shorter_capture_does_not_count(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    """As its worker might have made it while the store grew."""
    short = capture_here(cache_config(tmp_path / "s.zarr", rows=70)).commits[17]
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=100))
    commit.withdraw(store.place, 17)
    commit.write(store.place, short)
    for task in (
        lambda: ActivationStore.open(tmp_path / "s.zarr"),
        lambda: worker.capture_unit(torch.nn.Identity(), store, [], 17, "cpu"),
    ):
        with pytest.raises(UserError, match=r"00000017.json is of rows \(68, 70\), not \(68, 72\).*delete it"):
            task()


def test_a_worker_of_a_shorter_capture_commits_nothing(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    short = capture_here(cache_config(tmp_path / "s.zarr", rows=70))
    pairs = {"layers.1.mlp": (torch.zeros(32, D_MODEL), torch.zeros(32, D_MODEL))}
    block = short.tokens(17)
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=100))
    commit.withdraw(store.place, 17)
    with pytest.raises(UserError, match="has grown while it was captured"):
        writer.write_unit(store.place, short.attrs, 17, pairs, block)
    assert 17 not in commit.committed_units(store.place)


@pytest.mark.parametrize("other", [None, "context", "repeat", "model", "rows", "broken", "unreadable"])
def test_token_rows_of_a_neighbour_are_taken_if_they_are_the_same(
    tmp_path: Path, cache_config: Any, capture_here: Any, other: str | None, capsys: Any
) -> None:
    """Other layers, the same text; and what keeps rows from being the same, or from being read."""
    first = cache_config(tmp_path / "first.zarr", ("layers.0.mlp",), rows=20 if other == "rows" else 40)
    store = capture_here(first)
    metadata = json.loads((store.path / "zarr.json").read_text())
    identity = metadata["attributes"]["identity"]
    changed = {"context": {"context": 8}, "repeat": {"repeat": True}, "model": {"model": {"fingerprint": "x"}}}
    identity |= changed.get(other or "", {})
    (store.path / "zarr.json").write_text("[]" if other == "broken" else json.dumps(metadata))
    if other == "unreadable":
        (tmp_path / "loop.zarr").symlink_to(tmp_path / "loop.zarr")
    second = capture_here(cache_config(tmp_path / "second.zarr", rows=40))
    said = capsys.readouterr().out
    assert ("taking the token rows of" in said) == (other in (None, "unreadable"))
    (tmp_path / "alone").mkdir()
    alone = capture_here(cache_config(tmp_path / "alone" / "s.zarr", rows=40))
    assert files(second.path) == files(alone.path)


def test_finished_store_is_left_alone(store: ActivationStore, cache_config: Any, capsys: Any) -> None:
    before = files(store.path)
    cache.capture(cache_config(store.path, ("layers.*.mlp",)))
    assert "complete, nothing to do" in capsys.readouterr().out
    assert files(store.path) == before


def test_finding_nothing_to_do_loads_nothing_heavy(store: ActivationStore, cache_config: Any) -> None:
    """It takes a second then, whatever the model."""
    cfg = OmegaConf.to_container(OmegaConf.structured(cache_config(store.path, ("layers.*.mlp",))), enum_to_str=True)
    script = f"""
import sys
from omegaconf import OmegaConf
from skipcoder.pipeline import cache
from skipcoder.settings import typed
cfg = OmegaConf.create({cfg})
cache.capture(typed(cfg, cache.CacheConfig))
print(sorted({{"torch", "transformers", "ray", "datasets"}} & sys.modules.keys()))
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "complete, nothing to do" in said.stdout and said.stdout.splitlines()[-1] == "[]", said.stderr


def test_another_capture_at_this_path_is_refused_naming_the_keys(store: ActivationStore, cache_config: Any) -> None:
    other = cache_config(store.path, ("layers.*.mlp",), unit_rows=2)
    other.seed = 7
    with pytest.raises(UserError, match=r"seed: 0 there, 7 asked; unit_rows: 4 there, 2 asked"):
        cache.capture(other)


def test_changed_text_is_refused_when_growing(
    tmp_path: Path, cache_config: Any, capture_here: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = cache_config(tmp_path / "s.zarr", rows=64)
    capture_here(cfg)
    identity = cache.sources.identity(cfg.data)
    monkeypatch.setattr(cache.sources, "identity", lambda _: identity)  # as if the fingerprint had missed the change
    (tmp_path / "other.jsonl").write_text("".join(text_file.read_text().splitlines(keepends=True)[1:]))
    cfg = cache_config(tmp_path / "s.zarr", rows=80)
    cfg.data.path = str(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="other tokens than it did"):
        capture_here(cfg)


def test_what_is_not_a_store(tmp_path: Path, store: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"no activation store at .*nowhere; make one with: python pipeline/cache.py"):
        ActivationStore.open(tmp_path / "nowhere")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an activation store; choose another"):
        ActivationStore.open(tmp_path / "x")
    zarr.open_group(tmp_path / "z.zarr", mode="w")
    with pytest.raises(UserError, match="a Zarr group, but not an activation store"):
        ActivationStore.open(tmp_path / "z.zarr")
    metadata = json.loads((store.path / "zarr.json").read_text())
    metadata["attributes"]["version"] = 99
    (tmp_path / "z.zarr" / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="format version 99, this skipcoder reads 2"):
        ActivationStore.open(tmp_path / "z.zarr")


def test_too_few_units_to_hold_one_out(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=8))
    with pytest.raises(UserError, match=r"too few to hold one out.*smaller store.unit_rows"):
        store.split("train")


def test_unknown_hookpoint_lists_those_there(store: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"no hookpoint 'x'.*layers.0.mlp, layers.1.mlp, layers.2.mlp"):
        store.hookpoint("x")


def test_nan_fails_its_unit_with_its_place_and_commits_nothing(
    tmp_path: Path, cache_config: Any, capture_here: Any
) -> None:
    store = capture_here(cache_config(tmp_path / "s.zarr"))
    commit.withdraw(place_at(store.path), 2)

    class Poisoned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = torch.nn.Identity()

        def forward(self, tokens: torch.Tensor, use_cache: bool) -> torch.Tensor:
            z = torch.ones(*tokens.shape, D_MODEL)
            z[1, 5, 3] = float("nan")
            return self.mlp(z)

    hookpoint = worker.Hookpoint("layers.1.mlp", "mlp", "mlp")
    with pytest.raises(worker.NonFiniteError, match=r"layers.1.mlp/input: activation at row 9, position 5"):
        worker.capture_unit(Poisoned(), store, [hookpoint], 2, "cpu")
    assert 2 not in commit.committed_units(place_at(store.path))
    assert layout.num_units(store.rows, UNIT_ROWS) == UNITS


def test_failed_growth_loses_nothing(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    """More is asked than the text holds: refused, and the short last unit is still there."""
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=70))
    units, rows = store.units, store.rows
    with pytest.raises(UserError, match=r"but data\.tokens asks for"):
        capture_here(cache_config(tmp_path / "s.zarr", rows=10**6))
    again = ActivationStore.open(tmp_path / "s.zarr")
    assert (again.units, again.rows) == (units, rows) and again.is_complete
    again.tokens(units[-1])


def test_a_second_capture_on_the_same_store_is_refused(store: ActivationStore, cache_config: Any) -> None:
    with (
        place_at(store.path).only_writer(),
        pytest.raises(UserError, match="another capture is at work"),
    ):
        cache.capture(cache_config(store.path, ("layers.*.mlp",)))


def test_statistics_are_merged_once_and_kept_beside_the_store(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = ActivationStore.open(copy).moments("layers.1.mlp", "output")
    (file,) = (copy.parent / "copy.derived").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(commit, "read_statistics", None)  # opening a store and asking again reads none
        again = ActivationStore.open(copy).moments("layers.1.mlp", "output")
    file.write_bytes(file.read_bytes()[:50])
    mended = ActivationStore.open(copy).moments("layers.1.mlp", "output")
    for one in (again, mended):
        assert one.count == merged.count and one.norms == merged.norms
        np.testing.assert_array_equal(one.mean, merged.mean)
    file.unlink()
    damaged = copy / commit.statistics_file("layers.1.mlp", 2)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"layers.1.mlp/00000002.safetensors cannot be read .*checksum.* re-run"):
        ActivationStore.open(copy).moments("layers.1.mlp", "output")


def test_what_was_derived_from_other_bytes_is_not_used(copy: Path) -> None:
    """The same identity, captured anew by other software."""
    before = ActivationStore.open(copy).moments("layers.1.mlp", "output")
    record = json.loads((copy / commit.record_file(0)).read_text())
    name = commit.statistics_file("layers.1.mlp", 0)
    moments = unpack((copy / name).read_bytes())
    moments["output/other"] = Moments.of(np.full((9, D_MODEL), 7.0, np.float32))
    (copy / name).write_bytes(pack(moments))
    record["shards"][name] = commit.checksum((copy / name).read_bytes())
    (copy / commit.record_file(0)).write_text(json.dumps(record))
    assert (ActivationStore.open(copy).moments("layers.1.mlp", "output").mean != before.mean).any()
