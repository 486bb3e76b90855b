import copy
import errno
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.files import read_coder, write_coder
from skipcoder.trainer.coder.fold import fold, power_of_two_scale
from skipcoder.trainer.config import CoderConfig, Kind
from tests.trainer.coders import ONE_BY_ONE

D, M, K = 6, 20, 4


def random_coder(kind: Kind, seed: int = 0) -> SparseCoder:
    coder = SparseCoder(CoderConfig(kind=kind, k=K, width=M), D, D, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for p in coder.parameters():
        p.data += torch.randn(p.shape, generator=generator)
    return coder.requires_grad_(False)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_formula(kind: Kind) -> None:
    coder, x = random_coder(kind), torch.randn(9, D)
    pre = (x - (coder.b_dec if coder.cfg.reconstructs else 0)) @ coder.W_enc.T + coder.b_enc
    values, indices = pre.relu().topk(K)
    f = torch.zeros(9, M).scatter_(1, indices, values)
    y_hat = f @ coder.W_dec + coder.b_dec
    if kind == Kind.skip_transcoder:
        assert coder.W_skip is not None
        y_hat = y_hat + x @ coder.W_skip.T
    out = coder(x)
    torch.testing.assert_close(out.y_hat, y_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.values, values, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.indices[values > 0], indices[values > 0])


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_initialisation(kind: Kind) -> None:
    coder = SparseCoder(CoderConfig(kind=kind, k=K, width=M), D, D, seed=3)
    mean_x, mean_y = torch.randn(D), torch.randn(D)
    coder.init_biases(mean_x, mean_y)
    assert coder.W_enc.abs().max() <= D**-0.5
    assert torch.equal(coder.b_dec, mean_y)
    if coder.cfg.reconstructs:
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(M))
        torch.testing.assert_close(coder.W_dec * coder.W_enc.norm(dim=1, keepdim=True), coder.W_enc)
        assert not coder.b_enc.any()
    else:
        torch.testing.assert_close(coder(torch.randn(5, D)).y_hat, mean_y.expand(5, D))  # constant
        torch.testing.assert_close(coder.b_enc, -coder.W_enc @ mean_x)
    assert torch.equal(coder.W_enc, SparseCoder(coder.cfg, D, D, seed=3).W_enc)
    assert not torch.equal(coder.W_enc, SparseCoder(coder.cfg, D, D, seed=4).W_enc)


def test_leading_dimensions_and_half_precision_inputs() -> None:
    coder = random_coder(Kind.skip_transcoder)
    x = torch.randn(2, 3, D, dtype=torch.bfloat16)
    out = coder(x)
    assert out.y_hat.shape == (2, 3, D) and out.values.shape == out.indices.shape == (2, 3, K)
    assert torch.equal(out.y_hat[1, 2], coder(x[1, 2]).y_hat) or torch.allclose(out.y_hat[1, 2], coder(x[1, 2]).y_hat)


def test_no_tokens() -> None:
    out = random_coder(Kind.transcoder)(torch.zeros(0, D))
    assert out.y_hat.shape == (0, D) and out.values.shape == (0, K)


def test_skip_only_is_the_coder_with_every_latent_at_zero() -> None:
    coder = random_coder(Kind.skip_transcoder)
    x = torch.randn(5, D)
    silent = copy.deepcopy(coder)
    silent.W_dec.zero_()
    torch.testing.assert_close(coder.skip_only(x), silent(x).y_hat)
    assert torch.equal(random_coder(Kind.sae).skip_only(x)[3], random_coder(Kind.sae).b_dec)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_folding_is_exact(kind: Kind) -> None:
    """Powers of two: the same latents and bit-equal values; outputs scaled exactly."""
    coder, s_in = random_coder(kind), 4.0
    s_out = s_in if coder.cfg.reconstructs else 0.125
    folded = fold(coder, s_in, s_out)
    x = torch.randn(50, D)
    scaled, raw = coder(x), folded(x * s_in)
    assert torch.equal(scaled.indices, raw.indices)
    assert torch.equal(scaled.values, raw.values)
    assert torch.equal(scaled.y_hat * s_out, raw.y_hat)


def test_scale_is_a_power_of_two_near_the_rms() -> None:
    assert [power_of_two_scale(v) for v in (1.0, 0.0, 100.0, 1e-4)] == [1.0, 1.0, 8.0, 2.0**-7]


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_save_and_load(kind: Kind, tmp_path: Path) -> None:
    coder = random_coder(kind)
    coder.meta = {"hookpoint": "layers.1.mlp", "seed": 5}
    coder.save(tmp_path / "run" / "checkpoint")
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        again = SparseCoder.load(place)
        assert again.cfg == coder.cfg and again.meta == coder.meta
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), coder.parameters(), strict=True))
    described = json.loads((tmp_path / "run" / "checkpoint" / "coder.json").read_text())
    assert described["kind"] == kind.value and described["d_in"] == D
    assert described["subtract_decoder_bias"] is coder.cfg.reconstructs
    assert not list((tmp_path / "run" / "checkpoint").glob("*.partial"))


def test_a_coder_of_before_a_setting_was_there(tmp_path: Path) -> None:
    """Files that lack it mean what was then the only way."""
    coder = random_coder(Kind.transcoder)
    coder.save(tmp_path)
    tensors, description = read_coder(tmp_path)
    older: Any = {key: value for key, value in description.items() if key != "window"}
    write_coder(tmp_path, tensors, older)
    again = SparseCoder.load(tmp_path)
    assert again.cfg == coder.cfg and torch.equal(again.W_enc, coder.W_enc)


def test_damaged_or_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no coder.safetensors in .*trained to its end"):
        SparseCoder.load(tmp_path)
    random_coder(Kind.sae).save(tmp_path)
    file = tmp_path / "coder.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"coder.safetensors is damaged"):
        SparseCoder.load(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("width", 2**50), ("d_in", 2**50), ("d_out", 2**50)])
def test_sizes_that_are_not_the_files_are_refused_before_memory_is_taken(key: str, value: int, tmp_path: Path) -> None:
    random_coder(Kind.transcoder).save(tmp_path)
    tensors, description = read_coder(tmp_path)
    described: Any = {**description, key: value}
    write_coder(tmp_path, tensors, described)
    with pytest.raises(UserError, match=r"is damaged: W_(enc|dec) has shape \(20, 6\), not "):
        SparseCoder.load(tmp_path)


def test_an_sae_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match="d_in=4 and d_out=5"):
        SparseCoder(CoderConfig(kind=Kind.sae, k=1, width=8), 4, 5)


def test_a_coder_that_fills_the_disk(tmp_path: Path) -> None:
    """The tensors are written by another library, whose word for a full disk is not ours."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets us mount no disk")
    try:
        with pytest.raises(OSError, match=r"No space left on device: .*coder.safetensors") as found:
            SparseCoder(CoderConfig(kind=Kind.transcoder, k=2, width=500), 30, 30).save(disk)
        assert found.value.errno == errno.ENOSPC and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
