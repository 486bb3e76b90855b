"""Models that fit no single device: spread over several, read from the disk as needed, or in fewer bits."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.pipeline import cache, plan
from skipcoder.pipeline.capture import job
from skipcoder.pipeline.config import CacheConfig, DeviceMap, ModelConfig, Quantization, RayConfig
from skipcoder.pipeline.model import load
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.bank import train
from tests.pipeline.store.test_writer import files
from tests.trainer.bank.test_bank import config

pytestmark = pytest.mark.slow


def on_disk(cfg: CacheConfig, folder: Path) -> CacheConfig:
    """Of the three layers one fits into memory."""
    cfg.model.device_map, cfg.model.max_memory = DeviceMap.auto, {"cpu": "60KB"}
    cfg.model.offload_folder = str(folder)
    return cfg


def test_a_model_on_cpu_and_disk_gives_the_same_bytes(
    cache_config: Any, capture_here: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    hookpoints = ("layers.*.mlp",)
    whole = capture_here(cache_config(tmp_path / "whole.zarr", hookpoints, rows=68))
    cfg = on_disk(cache_config(tmp_path / "spread.zarr", hookpoints, rows=68), tmp_path / "offload")
    model: Any = load.load_causal_lm(cfg.model, "cpu")
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    spread = capture_here(cfg)
    different = {name for name, content in files(whole.path).items() if files(spread.path)[name] != content}
    assert different <= {"zarr.json"}  # whose configuration of the model says how it was loaded
    assert whole.attrs["identity"] == spread.attrs["identity"]
    capture_here(
        on_disk(cache_config(tmp_path / "whole.zarr", hookpoints, rows=68), tmp_path / "offload")
    )  # nothing to do

    train(config(spread, steps=4, lr=1e-3), tmp_path / "run")
    (row,) = evaluate(EvaluateConfig(run=str(tmp_path / "run"), ce_tokens=128))
    assert row["ce_clean"] > 0 and row["ce_spliced"] > 0


def test_fewer_bits_are_another_model(
    cache_config: Any, capture_here: Callable[..., ActivationStore], tiny_model: Path, tmp_path: Path
) -> None:
    if find_spec("bitsandbytes") is None:
        pytest.skip("pip install bitsandbytes")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=400, bos_token_id=0, eos_token_id=1, **shape))  # type: ignore[arg-type]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")

    def make(name: str, quantization: Quantization | None) -> CacheConfig:
        cfg: CacheConfig = cache_config(tmp_path / f"{name}.zarr")
        cfg.model.id, cfg.model.quantization = str(tmp_path / "model"), quantization
        return cfg

    plain = capture_here(make("bf16", None))
    for quantization, error in ((Quantization.int8, 0.1), (Quantization.int4, 0.5)):
        store = capture_here(make(quantization.value, quantization))
        x, y = (s.activations("layers.1.mlp", "output", 0, 512).float() for s in (plain, store))
        assert 0 < (x - y).norm() < error * x.norm()
        assert store.attrs["identity"]["model"]["quantization"] == quantization.value
        with pytest.raises(UserError, match=rf"holds another capture \(model.quantization: {quantization.value} there"):
            capture_here(make(quantization.value, None))


def test_what_is_missing_or_cannot_be(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, cache_config: Any, tmp_path: Path
) -> None:
    of: dict[str, Any] = {"name": "tiny", "id": str(tiny_model)}
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"model.quantization=int8 needs bitsandbytes: pip install 'skipcoder\[large\]'"
    ):
        load.load_causal_lm(ModelConfig(**of, quantization=Quantization.int8), "cpu")
    with pytest.raises(UserError, match=r"model.device_map and model.quantization need accelerate"):
        load.load_causal_lm(ModelConfig(**of, device_map=DeviceMap.auto), "cpu")
    for bad, said in (
        ({"offload_folder": "x"}, "model.offload_folder needs model.device_map=auto"),
        ({"max_memory": {"cpu": "1GiB"}}, "model.max_memory needs model.device_map=auto"),
        ({"device_map": DeviceMap.auto, "max_memory": {"gpux": "1GiB"}}, "'gpux' is neither cpu nor gpu0"),
        ({"quantization": Quantization.int8, "gguf_file": "a.gguf"}, "model.quantization is for unquantised weights"),
        ({"device_map": DeviceMap.auto, "shuffle": 1}, "model.shuffle permutes weights in memory"),
    ):
        with pytest.raises(UserError, match=said):
            ModelConfig(**of, **bad)


def test_several_gpus_hold_one_copy(cache_config: Any, tmp_path: Path) -> None:
    cfg = cache_config(tmp_path / "s.zarr")
    cfg.ray.gpus_per_worker = 2
    cache._choose(cfg, None)
    assert cfg.model.device_map is DeviceMap.auto
    cfg.model.shuffle = 1
    with pytest.raises(UserError, match=r"model.shuffle .* goes with one GPU: ray.gpus_per_worker=1"):
        cache._choose(cfg, None)


def test_gpus_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # read once, on import
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 8.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}])
    assert job._share(RayConfig(gpus_per_worker=4, workers=2)) == (4, 4)
    with pytest.raises(UserError, match=r"ray.gpus_per_worker=8, but Ray's largest machine has 4 GPUs; lower it"):
        job._share(RayConfig(gpus_per_worker=8))
    with pytest.raises(UserError, match=r"ray.gpus_per_worker=1.5: must be a whole number above 1, or a part of one"):
        job._share(RayConfig(gpus_per_worker=1.5))


def test_the_plan_says_whether_the_weights_fit(
    cache_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = cache_config(tmp_path / "s.zarr", ("layers.0.mlp",))
    trunk = load.load_trunk(cfg.model, load.describe(cfg.model, cfg.hookpoints, 8).hookpoints, "cpu")
    weights = load.describe(cfg.model, cfg.hookpoints, 8).weight_bytes
    assert weights == 2 * sum(p.numel() for p in trunk.parameters())
    assert "too little" not in plan.fits(weights, cfg)
    memory = type("Memory", (), {"available": weights})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert "too little. Try model.quantization=int8, or model.device_map=auto" in plan.fits(weights, cfg)
    cfg.model.quantization = Quantization.int4
    linear = sum(m.weight.numel() for m in trunk.modules() if isinstance(m, torch.nn.Linear))
    assert load.describe(cfg.model, cfg.hookpoints, 8).weight_bytes == weights - 1.5 * linear
