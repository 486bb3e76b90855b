"""int8 and fp8 stores: small errors, that are told; massive activations harm only themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.store.codecs import Coded
from skipcoder.pipeline.store.codecs.bf16 import Bf16, Bf16Words, decode_on_device
from skipcoder.pipeline.store.codecs.scaled import Fp8, Int8, channel_scale
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.testing import CodecTests

N, D = 2048, 48


def decoded(codec: Any, coded: Coded) -> torch.Tensor:
    z = torch.empty(coded[""].shape, dtype=torch.bfloat16)
    codec.decode(coded, z)
    return z


def relative_error(codec: Any, z: torch.Tensor) -> torch.Tensor:
    """Per token: squared error over squared length."""
    error = decoded(codec, codec.encode(z)).double() - z.double()
    return error.square().sum(1) / z.double().square().sum(1)


def gaussian(channels: torch.Tensor | None = None) -> torch.Tensor:
    z = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return z if channels is None else z * channels


@pytest.mark.parametrize("codec", [Int8, Fp8])
def test_error_is_within_half_a_step_of_the_codes(codec: Any) -> None:
    """int8: half a unit of code times both scales. fp8: 2^-4 of the value, or half of the smallest subnormal. To both
    comes bfloat16's rounding of what is decoded, 2^-8 of it at most."""
    z = gaussian(torch.logspace(-3, 3, D))
    coded = codec.encode(z)
    step = coded["_scale"][:, None] * coded["_channel_scale"]
    error = (decoded(codec, coded).float() - z).abs()
    half = 0.5 * step if codec is Int8 else torch.maximum(z.abs() * 2**-4, step * 2**-10)
    assert (error <= half * (1 + 1e-5) + (z.abs() + half) * 2**-8).all()
    assert coded[""].view(torch.int8).int().abs().max() <= 127


@pytest.mark.parametrize(("codec", "most"), [(Int8, 3e-4), (Fp8, 1.5e-3)])
def test_channels_that_are_always_large_do_not_harm_the_others(codec: Any, most: float) -> None:
    """A hundredfold channel, as residual streams have them: every channel keeps its own precision."""
    channels = torch.ones(D)
    channels[3] = 100.0
    z = gaussian(channels)
    error = (decoded(codec, codec.encode(z)).double() - z.double()).square().sum(0) / z.double().square().sum(0)
    assert error.max() < most


@pytest.mark.parametrize(("codec", "most"), [(Int8, 3e-4), (Fp8, 1.5e-3)])
def test_massive_activations_of_a_few_tokens_leave_the_others_alone(codec: Any, most: float) -> None:
    z = gaussian()
    massive = torch.arange(0, N, 64)
    z[massive, 5] = 3000.0
    error = relative_error(codec, z)
    usual = torch.ones(N, dtype=torch.bool)
    usual[massive] = False
    assert error[usual].max() < 4 * most and error[usual].mean() < most
    assert error[massive].max() < most  # by its length, which is the massive channel's


@pytest.mark.parametrize("codec", [Int8, Fp8])
def test_zeros_and_rare_channels(codec: Any) -> None:
    z = torch.zeros(64, 4)
    z[7] = torch.tensor([0.0, 1e-3, -2.0, 0.0])
    found = decoded(codec, codec.encode(z)).float()
    assert torch.equal(found[0], torch.zeros(4))
    torch.testing.assert_close(found[7], z[7], rtol=0.07, atol=0)
    assert (channel_scale(torch.zeros(3, 2)) == 1).all()


EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("shape", [(2**16, 1), (256, 256), (1, 2**16), (2**16 // 3, 3)])
def test_bf16_holds_every_pattern_of_bits(shape: tuple[int, int]) -> None:
    """NaN payloads, infinities, denormals and -0 among them; odd widths, rows wider than a part."""
    z = EVERY[: shape[0] * shape[1]].reshape(shape).repeat(3, 1)
    coded = Bf16.encode(z)
    on_device = torch.empty_like(z)
    decode_on_device(coded, on_device)  # what a GPU does
    assert torch.equal(decoded(Bf16, coded).view(torch.int16), z.view(torch.int16))
    assert torch.equal(on_device.view(torch.int16), z.view(torch.int16))


@given(data=arrays(np.uint16, array_shapes(min_dims=2, max_dims=2, max_side=40)), near=st.integers(0, 2**16 - 1))
def test_bf16_is_lossless_on_anything(data: np.ndarray, near: int) -> None:
    """Also on channels whose exponents are close together, as in real activations."""
    for bits in (data, (data & 0x8FFF | near & 0x7000).astype(np.uint16)):
        z = torch.from_numpy(bits).view(torch.bfloat16)
        assert torch.equal(decoded(Bf16, Bf16.encode(z)).view(torch.int16), z.view(torch.int16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("codec", [Bf16, Int8, Fp8])
def test_a_gpu_codes_as_a_cpu_does(codec: Any) -> None:
    z = gaussian(torch.logspace(-3, 3, D)).bfloat16()
    here, there = codec.encode(z), codec.encode(z.cuda())
    assert all(torch.equal(here[suffix], there[suffix].cpu()) for suffix in here)
    back = torch.empty_like(z, device="cuda")
    codec.decode(there, back)
    assert torch.equal(back.cpu(), decoded(codec, here))


class TestBf16(CodecTests):
    codec = Bf16


class TestBf16Words(CodecTests):
    codec = Bf16Words


class TestInt8(CodecTests):
    codec = Int8
    lost = 3e-4


class TestFp8(CodecTests):
    codec = Fp8
    lost = 1.5e-3


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_store_reads_back_in_any_range_and_tells_what_was_lost(
    codec: str,
    store: ActivationStore,
    cache_config: Callable[..., CacheConfig],
    capture_here: Callable[[CacheConfig], ActivationStore],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lossy = capture_here(cache_config(tmp_path / "s.zarr", ("layers.*.mlp",), codec=codec))
    assert f"lost to {codec}" in capsys.readouterr().out
    n = store.rows * store.context
    for side in ("input", "output"):
        exact, coded = (s.activations("layers.1.mlp", side, 0, n).double() for s in (store, lossy))
        first, last = lossy.unit_range(1)[0] - 3, lossy.unit_range(2)[1] - 5
        assert torch.equal(lossy.activations("layers.1.mlp", side, first, last).double(), coded[first:last])
        everywhere = ("first", "special", "other")
        lost = (coded - exact).square().sum() / (coded - coded.mean(0)).square().sum()
        assert lossy.moments("layers.1.mlp", side, None, everywhere).lost == pytest.approx(float(lost), rel=1e-9)
        assert 0 < lost < 2e-3
        assert store.moments("layers.1.mlp", side, None, everywhere).lost == 0
        moments = lossy.moments("layers.1.mlp", side, "train", everywhere)
        spans = [lossy.unit_range(u) for u in lossy.split("train")]
        train = torch.cat([coded[a:b] for a, b in spans])
        np.testing.assert_allclose(moments.mean, train.mean(0).numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_growing_a_lossy_store_gives_the_bytes_of_capturing_at_once(
    codec: str,
    cache_config: Callable[..., CacheConfig],
    capture_here: Callable[[CacheConfig], ActivationStore],
    tmp_path: Path,
) -> None:
    def files(path: Path) -> dict[str, bytes]:
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}

    capture_here(cache_config(tmp_path / "grown.zarr", rows=18, codec=codec))
    capture_here(cache_config(tmp_path / "grown.zarr", rows=31, codec=codec))
    capture_here(cache_config(tmp_path / "whole.zarr", rows=31, codec=codec))
    assert files(tmp_path / "grown.zarr") == files(tmp_path / "whole.zarr")
