"""Other tools' files: what is written is read back bit for bit, what cannot be held is refused, what is read computes
what its formula says. The tools themselves are in test_peers.py."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skipcoder.errors import UserError
from skipcoder.testing import FormatTests
from skipcoder.trainer.coder import readers
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.convert import converted
from skipcoder.trainer.config import ActivationName, Kind
from skipcoder.trainer.formats import circuit_tracer, plain, saelens, sparsify
from tests.trainer.coders import ONE_BY_ONE, assert_same_function, meta, random_coder

SAE, TRANSCODER, SKIP, CROSSCODER, *_ = Kind
EVERY = [(kind, activation) for kind in ONE_BY_ONE for activation in ActivationName]


def holds(format: str, kind: Kind, activation: ActivationName) -> bool:
    """What docs/formats.md promises."""
    return format == "plain" or (
        kind is not CROSSCODER
        and {
            "sparsify": activation in (ActivationName.topk, ActivationName.groupmax),
            "saelens": activation != ActivationName.groupmax,
            "circuit_tracer": kind is not SAE and activation != ActivationName.groupmax,
        }[format]
    )


def write(format: str, coder: SparseCoder, folder: Path) -> None:
    if format == "circuit_tracer":
        circuit_tracer.write([coder], folder)
    else:
        {"plain": plain, "sparsify": sparsify, "saelens": saelens}[format].write(coder, folder)


def attached(kind: Kind, activation: ActivationName = ActivationName.topk) -> SparseCoder:
    coder = random_coder(kind, activation)
    coder.meta = meta("layers.0.mlp", kind)
    return coder


class TestPlain(FormatTests):
    name = "plain"

    def write(self, coder: SparseCoder, folder: Path) -> None:
        plain.write(coder, folder)

    @pytest.fixture
    def coder(self) -> SparseCoder:
        return attached(SKIP, ActivationName.batchtopk)


class TestSparsify(FormatTests):
    name = "sparsify"

    def write(self, coder: SparseCoder, folder: Path) -> None:
        sparsify.write(coder, folder)

    @pytest.fixture
    def coder(self) -> SparseCoder:
        return attached(SAE)


class TestSAELens(FormatTests):
    name = "saelens"

    def write(self, coder: SparseCoder, folder: Path) -> None:
        saelens.write(coder, folder)

    @pytest.fixture
    def coder(self) -> SparseCoder:
        return attached(TRANSCODER, ActivationName.jumprelu)


class TestCircuitTracer(FormatTests):
    name = "circuit_tracer"
    options: ClassVar = {"layer": 0}

    def write(self, coder: SparseCoder, folder: Path) -> None:
        circuit_tracer.write([coder], folder)

    @pytest.fixture
    def coder(self) -> SparseCoder:
        return attached(SKIP)


@pytest.mark.parametrize("format", ["plain", "sparsify", "saelens", "circuit_tracer"])
@pytest.mark.parametrize(("kind", "activation"), EVERY)
def test_round_trips_bit_for_bit_or_is_refused(
    format: str, kind: Kind, activation: ActivationName, tmp_path: Path
) -> None:
    coder = attached(kind, activation)
    if not holds(format, kind, activation):
        with pytest.raises(UserError, match=rf"{format} cannot hold this {kind} \({activation.value}\)"):
            write(format, coder, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    write(format, coder, tmp_path)
    assert readers.detect(tmp_path) == format
    options: dict[str, Any] = {"layer": 0} if format == "circuit_tracer" else {}
    again = readers.read(tmp_path, **options)
    ours, theirs = coder.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(coder(x).y_hat, again(x).y_hat)


@pytest.mark.parametrize("format", ["sparsify", "saelens", "circuit_tracer"])
@pytest.mark.parametrize("of_ones_own", ["kind", "activation"])
def test_extensions_are_refused_by_others_formats(format: str, of_ones_own: str, tmp_path: Path) -> None:
    coder = random_coder(TRANSCODER)
    setattr(coder.cfg, of_ones_own, "mine")
    with pytest.raises(UserError, match=f"{format} cannot hold this .*its {of_ones_own} can be"):
        write(format, coder, tmp_path)


def test_unequal_widths(tmp_path: Path) -> None:
    coder = random_coder(TRANSCODER, d_out=12)
    coder.meta = meta()
    with pytest.raises(UserError, match="d_out = d_in, but these are 12 and 24"):
        sparsify.write(coder, tmp_path)
    with pytest.raises(UserError, match="d_out = d_in, not 12 and 24"):
        circuit_tracer.write([coder], tmp_path)
    saelens.write(coder, tmp_path)
    assert readers.read(tmp_path).d_out == 12


def test_sparsify_files_are_exactly_these(tmp_path: Path) -> None:
    sparsify.write(random_coder(SKIP), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"cfg.json", "sae.safetensors"}
    assert set(load_file(tmp_path / "sae.safetensors")) == {
        "W_dec", "W_skip", "b_dec", "encoder.bias", "encoder.weight"}  # fmt: skip
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 64, "k": 4,
        "multi_topk": False, "skip_connection": True, "transcode": True, "d_in": 24}  # fmt: skip


def test_transcoders_from_before_february_2025_subtracted_b_dec(tmp_path: Path) -> None:
    coder = random_coder(SKIP)
    sparsify.write(coder, tmp_path)
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    pre = ((x - coder.b_dec) @ coder.W_enc.T + coder.b_enc).relu()
    values, indices = pre.topk(4)
    wanted = (values[..., None] * coder.W_dec[indices]).sum(1) + x @ coder.W_skip.T + coder.b_dec  # type: ignore
    old = readers.read(tmp_path, subtract_decoder_bias=True)
    assert isinstance(old, SparseCoder)
    assert_same_function(old, x, wanted)
    assert not torch.equal(readers.read(tmp_path)(x).indices, old(x).indices)
    sparsify.write(random_coder(SAE), tmp_path)
    with pytest.raises(UserError, match="SAEs always subtract b_dec"):
        readers.read(tmp_path, subtract_decoder_bias=True)


@pytest.mark.parametrize("transcoder", [False, True])
def test_gemma_scope(transcoder: bool, tmp_path: Path) -> None:
    """Its README's formula: acts = relu(x W_enc + b_enc) where that is above the threshold; acts W_dec + b_dec."""
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (24, 64), "b_enc": (64,), "W_dec": (64, 24), "b_dec": (24,), "threshold": (64,)}
    arrays: dict[str, Any] = {name: rng.normal(size=shape).astype(np.float32) / 5 for name, shape in shapes.items()}
    arrays["threshold"] = np.abs(arrays["threshold"])
    np.savez(tmp_path / "params.npz", **arrays)
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    w = {name: torch.from_numpy(array) for name, array in arrays.items()}
    pre = x @ w["W_enc"] + w["b_enc"]
    wanted = (pre.relu() * (pre > w["threshold"])) @ w["W_dec"] + w["b_dec"]
    coder = readers.read(tmp_path, transcoder=transcoder)
    assert isinstance(coder, SparseCoder)
    assert coder.cfg.kind is (TRANSCODER if transcoder else SAE)
    assert_same_function(coder, x, wanted)


@pytest.mark.parametrize(("out", "skip"), [("in", False), ("out", False), ("out", True)])
def test_gemma_scope_2(out: str, skip: bool, tmp_path: Path) -> None:
    """acts = relu(x w_enc + b_enc) where that is above the threshold; acts w_dec + b_dec + x affine_skip_connection."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w_enc": (24, 64), "b_enc": (64,), "w_dec": (64, 24), "b_dec": (24,), "threshold": (64,)}
    w = {name: torch.randn(shape, generator=generator) / 5 for name, shape in shapes.items()}
    w["threshold"] = w["threshold"].abs()
    if skip:
        w["affine_skip_connection"] = torch.randn(24, 24, generator=generator)
    save_file(w, tmp_path / "params.safetensors")
    config = {"architecture": "jump_relu", "l0": 20, "hf_hook_point_in": "in", "hf_hook_point_out": out}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(200, 24, generator=generator)
    pre = x @ w["w_enc"] + w["b_enc"]
    wanted = (pre.relu() * (pre > w["threshold"])) @ w["w_dec"] + w["b_dec"]
    coder = readers.read(tmp_path)
    assert isinstance(coder, SparseCoder)
    assert coder.cfg.kind == (SKIP if skip else TRANSCODER if out == "out" else SAE) and coder.cfg.k == 20
    assert_same_function(coder, x, wanted + x @ w["affine_skip_connection"] if skip else wanted)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "batch_topk"}))
    with pytest.raises(UserError, match=r"architecture=batch_topk: only jump_relu is read"):
        readers.read(tmp_path)


def test_converted_fires_as_often_as_was_chosen() -> None:
    coder = random_coder(SAE)
    x = torch.randn(4000, 24, generator=torch.Generator().manual_seed(1))
    chosen = torch.bincount(coder(x).indices.flatten(), minlength=64)
    found = converted(coder, x)(x)
    assert torch.equal(torch.bincount(found.indices[found.values > 0], minlength=64), chosen)


def test_circuit_tracer_wants_every_layer_and_one_description(tmp_path: Path) -> None:
    coders = []
    for layer in (0, 2):
        coder = random_coder(SKIP)
        coder.meta = meta(f"layers.{layer}.mlp")
        coders.append(coder)
    with pytest.raises(UserError, match=r"each layer from 0 on, not of layers \[0, 2\]"):
        circuit_tracer.write(coders, tmp_path)
    coders[1].meta = meta("layers.1.mlp")
    coders[1].cfg.k = 5
    with pytest.raises(UserError, match="equal kind, width, activation and k"):
        circuit_tracer.write(coders, tmp_path)
    negative = random_coder(SKIP, ActivationName.jumprelu)
    negative.meta = meta("layers.0.mlp")
    negative.threshold[3] = -0.1  # type: ignore[index]
    with pytest.raises(UserError, match="a threshold is below 0"):
        circuit_tracer.write([negative], tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        readers.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no coder; looked for .*sae\.safetensors \(sparsify\)"):
        readers.read(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"params\.npz cannot be read"):
        readers.read(tmp_path)
    with pytest.raises(UserError, match="format=delphi: choose from plain, sparsify"):
        readers.read(tmp_path, "delphi")
    coder = random_coder(SAE)
    sparsify.write(coder, tmp_path / "s")
    with pytest.raises(UserError, match="layer"):
        readers.read(tmp_path / "s", layer=3)
    (tmp_path / "s" / "cfg.json").write_text("[")
    with pytest.raises(UserError, match=r"cfg\.json cannot be read"):
        readers.read(tmp_path / "s")
    cfg = {"activation": "relu", "k": 4, "d_in": 24}
    (tmp_path / "s" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match="activation relu cannot be read; can be: topk, groupmax"):
        readers.read(tmp_path / "s")
    saelens.write(coder, tmp_path / "l")
    cfg = json.loads((tmp_path / "l" / "cfg.json").read_text())
    for key, value, message in (
        ("architecture", "gated", "architecture gated cannot be read"),
        ("normalize_activations", "layer_norm", "cannot be folded"),
    ):
        (tmp_path / "l" / "cfg.json").write_text(json.dumps(cfg | {key: value}))
        with pytest.raises(UserError, match=message):
            readers.read(tmp_path / "l")
    tensors = load_file(tmp_path / "l" / saelens.MARK)
    (tmp_path / "l" / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors | {"b_enc": torch.zeros(63)}, tmp_path / "l" / saelens.MARK)
    with pytest.raises(UserError, match=r"b_enc': \(64,\)"):
        readers.read(tmp_path / "l")
    del tensors["W_dec"]
    save_file(tensors, tmp_path / "l" / saelens.MARK)
    with pytest.raises(UserError, match="lacks W_dec; it holds W_enc"):
        readers.read(tmp_path / "l")


def test_plain_keeps_all_that_is_known(tmp_path: Path) -> None:
    coder = random_coder(SKIP, ActivationName.batchtopk)
    coder.cfg.prefixes = [16, 32]
    coder.meta = meta()
    plain.write(coder, tmp_path)
    again = readers.read(tmp_path)
    assert again.cfg == coder.cfg and again.meta == coder.meta
