"""Reading a store: what is in it is what was captured, and damage never passes for data."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from skipcoder.errors import UserError
from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments, pack, unpack
from skipcoder.pipeline.text.rows import hash_of
from skipcoder.pipeline.text.splits import SPLITS
from tests.conftest import CONTEXT, D_MODEL, UNIT_ROWS, UNITS


def test_values_are_those_of_plain_hooks_looked_up_through_index(store: ActivationStore, tiny_model: Path) -> None:
    """Bit for bit in bf16, for the same micro-batches; every hookpoint, both sides, every token."""
    lm: Any = model.load_causal_lm(ModelConfig(name="tiny", id=str(tiny_model)), "cpu")
    assert list(store.hookpoints) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str, _: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.setdefault(f"{name}/input", []).append(args[0].flatten(0, 1))
        seen.setdefault(f"{name}/output", []).append(out.flatten(0, 1))

    for name in store.hookpoints:
        lm.base_model.get_submodule(name).register_forward_hook(partial(note, name))
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
    for split in SPLITS:
        spans = [store.unit_range(unit) for unit in store.split(split)]
        y = torch.cat([store.activations("layers.1.mlp", "output", *span) for span in spans]).double().numpy()
        index = np.concatenate([store.read("index", *span) for span in spans]).astype(np.int64)
        tokens = store.read("tokens", 0, store.rows).ravel()[index]
        first = index % CONTEXT == 0
        special = np.isin(tokens, store.attrs["special_tokens"]) & ~first
        assert special.any() or split != "train"  # so that the class is not tested on nothing
        for classes, values in (
            (commit.POSITIONS, y),
            (("other",), y[~first & ~special]),
            (("special", "other"), y[~first]),
        ):
            moments = store.moments("layers.1.mlp", "output", split, classes)
            assert moments.count == len(values)
            np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(moments.variance, values.var(0), rtol=1e-9)


def test_a_document_is_in_one_split_and_its_text_is_what_it_was(store: ActivationStore, text_file: Path) -> None:
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    of_split = {name: {int(d) for unit in store.split(name) for d in store.documents(unit).flat} for name in SPLITS}
    assert all(of_split.values()) and sum(map(len, of_split.values())) == len(set().union(*of_split.values()))
    for number, document in zip(store.array("document_number")[:].flat, store.array("document")[:].flat, strict=True):
        assert document == hash_of(texts[number])


def test_splits(store: ActivationStore) -> None:
    assert store.is_complete and len(store.units) == UNITS
    assert (store.split("validation"), store.split("test")) == ([7, 23], [15, 31])
    assert store.chunk_rows == UNIT_ROWS * CONTEXT


def test_plain_zarr_reads_it(store: ActivationStore) -> None:
    """No skipcoder needed: the planes make bf16 bits, which are the upper half of a float32."""
    group: Any = zarr.open_group(store.path, mode="r")
    output = "layers.1.mlp/output"
    byte, nibbles = (group[f"{output}{name}"][:5].astype("uint32") for name in ("", "_exponent"))
    low, high = np.split(nibbles, 2, axis=1)
    below = np.concatenate([low & 15 | (high & 15) << 4, low >> 4 | high & 0xF0], axis=1)[:, : byte.shape[1]]
    bits = byte >> 7 << 31 | (group[f"{output}_exponent_top"][0] - below) << 23 | (byte & 0x7F) << 16
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
    moments["output/other"] = Moments.of(torch.full((9, D_MODEL), 7.0))
    (copy / name).write_bytes(pack(moments))
    record["shards"][name] = commit.checksum((copy / name).read_bytes())
    (copy / commit.record_file(0)).write_text(json.dumps(record))
    assert (ActivationStore.open(copy).moments("layers.1.mlp", "output").mean != before.mean).any()
