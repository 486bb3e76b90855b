"""plan=true: right sizes and counts, and nothing happens."""

from collections.abc import Callable
from pathlib import Path

import pytest

from skipcoder.pipeline import cache, plan
from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.store.codecs import CODECS
from tests.conftest import CONTEXT, D_MODEL

pytestmark = pytest.mark.slow


def test_flops_are_those_of_the_layers_that_run(cache_config: Callable[..., CacheConfig], tmp_path: Path) -> None:
    """Two of three layers: projections of 2 key-value heads of 4, attention over the row, three matrices of the MLP."""
    d, inner = D_MODEL, 48
    layer = 2 * (d * d + 2 * d * d // 2 + d * d) + 2 * 2 * CONTEXT * d + 3 * 2 * d * inner
    found = plan.make(cache_config(tmp_path / "s.zarr"))
    assert found.flops == pytest.approx(2 * layer, rel=0.01)


def test_weights_are_not_loaded_and_nothing_is_written(
    cache_config: Callable[..., CacheConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model, "_load", None)
    cfg = cache_config(tmp_path / "s.zarr", ("layers.*.mlp",), rows=132)
    cfg.plan = True
    cache.capture(cfg)
    said = capsys.readouterr().out
    assert "2,112 tokens, 3 hookpoints" in said and f"layers.2.mlp: {4 * D_MODEL} bytes a token" in said
    assert "GFLOP a token" in said and ", writing " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", CODECS)
def test_sizes_are_near_those_of_a_real_store(
    codec: str, cache_config: Callable[..., CacheConfig], capture_here: Callable, tmp_path: Path
) -> None:
    cfg = cache_config(tmp_path / "s.zarr", codec=codec)
    store = capture_here(cfg)
    shards = (s for record in store.commits.values() for s in record.shards.items() if s[0].startswith("layers"))
    real = sum(facts["bytes"] for _, facts in shards) / (store.rows * store.context)
    # Chunks of 64 tokens and 24 channels: headers, shard indices and channel scales weigh more than in real stores.
    ((_, planned),) = plan.make(cfg).sizes.values()
    assert planned == pytest.approx(real, rel=0.5)


def test_break_even() -> None:
    def least(forward: float, write: float, read: float) -> int | None:
        return plan.Plan(1, forward, 1.0, {}, 0.0, write, None, read, on_gpu=False, weights=0).break_even

    assert least(10, 1, 1) == 2  # 11 + 2 < 20
    assert least(10, 15, 0) == 3
    assert least(10, 0, 9) == 11  # 10 + 11 x 9 < 110
    assert least(1, 0, 2) is None


@pytest.mark.parametrize(("on_gpu", "seconds"), [(False, 10 + 1 + 20 + 30), (True, 30)])
def test_beside_a_gpu_others_compress_and_write(on_gpu: bool, seconds: float) -> None:
    assert plan.Plan(1, 10.0, 1.0, {}, 1.0, 20.0, 30.0, 1.0, on_gpu, 0).capture == seconds
