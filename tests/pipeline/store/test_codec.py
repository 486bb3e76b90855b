"""int8 and fp8 stores: small errors, that are told; massive activations harm only themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.store.codec import Bf16, Fp8, Int8, channel_scale
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.testing import CodecTests

N, D = 2048, 48


def relative_error(codec: Any, z: torch.Tensor) -> torch.Tensor:
    """Per token: squared error over squared length."""
    error = codec.decode(codec.encode(z)).double() - z.double()
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
    step = torch.from_numpy(coded["_scale"][:, None] * coded["_channel_scale"])
    error = (codec.decode(coded).float() - z).abs()
    half = 0.5 * step if codec is Int8 else torch.maximum(z.abs() * 2**-4, step * 2**-10)
    assert (error <= half * (1 + 1e-5) + (z.abs() + half) * 2**-8).all()
    assert np.abs(coded[""].view(np.int8).astype(int)).max() <= 127


@pytest.mark.parametrize(("codec", "most"), [(Int8, 3e-4), (Fp8, 1.5e-3)])
def test_channels_that_are_always_large_do_not_harm_the_others(codec: Any, most: float) -> None:
    """A hundredfold channel, as residual streams have them: every channel keeps its own precision."""
    channels = torch.ones(D)
    channels[3] = 100.0
    z = gaussian(channels)
    error = (codec.decode(codec.encode(z)).double() - z.double()).square().sum(0) / z.double().square().sum(0)
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
    found = codec.decode(codec.encode(z)).float()
    assert torch.equal(found[0], torch.zeros(4))
    torch.testing.assert_close(found[7], z[7], rtol=0.07, atol=0)
    assert (channel_scale(torch.zeros(3, 2)) == 1).all()


class TestBf16(CodecTests):
    codec = Bf16


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
