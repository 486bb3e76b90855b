"""Captures of a model with random weights, for gpu_data.py: the model, the capture in this process and by Ray, and
beside it the bare forward pass and the disk."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcoder.pipeline import cache
from skipcoder.pipeline.capture import job
from skipcoder.pipeline.capture.worker import Worker, micro_batch_rows
from skipcoder.pipeline.config import CacheConfig, DataConfig, ModelConfig, RayConfig, SourceKind, StoreConfig
from skipcoder.pipeline.model.hooks import capture
from skipcoder.pipeline.store.places import place_at

REPO = Path(__file__).resolve().parent.parent


class Found(dict[str, Any]):
    """What was measured, said at once: a run may be cut short."""

    def __setitem__(self, key: str, value: Any) -> None:
        print(f"{time.strftime('%T')} {key}: {value}", flush=True)
        super().__setitem__(key, value)


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def make_model(folder: Path, tiny: bool, device: str) -> Path:
    """A Llama with random weights and a byte-level tokenizer, in a directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train([str(REPO / "tests" / "text.jsonl")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    d, hidden, layers, heads, groups = (64, 128, 9, 4, 2) if tiny else (2048, 8192, 16, 32, 8)
    config = LlamaConfig(
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=2000,
        bos_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        lm: Any = LlamaForCausalLM(config)
    lm.to(torch.bfloat16).save_pretrained(folder)
    return folder


def configured(args: argparse.Namespace, model: Path, path: Path) -> CacheConfig:
    """The capture."""
    text = str(REPO / "tests" / "text.jsonl")
    return CacheConfig(
        model=ModelConfig(name="random", id=str(model)),
        data=DataConfig(kind=SourceKind.jsonl, path=text, tokens=args.tokens, context=args.context, repeat=True),
        store=StoreConfig(path=str(path), unit_rows=max(1, 16384 // args.context)),
        hookpoints=[f"layers.{layer}.mlp" for layer in args.layers],
    )


def disk(folder: Path, size: int) -> float:
    """Bytes a second that four threads write and sync, in files of 32 MiB."""
    content = np.random.default_rng(0).bytes(2**25)

    def write(i: int) -> None:
        with (folder / f"disk{i}").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())

    count = max(1, size // len(content))
    begun = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(count)))
    seconds = time.perf_counter() - begun
    for file in folder.glob("disk*"):
        file.unlink()
    return count * len(content) / seconds


def forward(worker: Worker, units: list[int], device: str) -> float:
    """Tokens a second of the bare captured forward pass."""
    store = worker.store
    rows = micro_batch_rows(store.attrs["identity"]["micro_batch_tokens"], store.context)
    tokens = [torch.from_numpy(store.tokens(unit)).long() for unit in units]
    wait(device)
    begun = time.perf_counter()
    for unit in tokens:
        for some in unit.split(rows):
            capture(worker.model, worker.hookpoints, some.to(device))
    wait(device)
    return sum(unit.numel() for unit in tokens) / (time.perf_counter() - begun)


def capture_here(args: argparse.Namespace, cfg: CacheConfig, found: Found) -> None:
    """Capture as a Ray actor with a GPU would, its calls made by threads; the bare forward pass before and after."""

    def run(store: Any, attrs: Any, units: list[int], model: ModelConfig, _: RayConfig) -> None:
        begun = time.perf_counter()
        worker = Worker(store.address, model, os.cpu_count() or 1, args.device)
        found["worker ready after, s"] = time.perf_counter() - begun
        some = units[: max(1, len(units) // 4)]
        forward(worker, some[:2], args.device)
        rates = [forward(worker, some, args.device)]
        worker({"item": np.array(units[:1])})  # pinned memory, kernels
        rest = units[1:]
        tokens = attrs["identity"]["unit_rows"] * attrs["identity"]["context"]
        for i, writers in enumerate(args.writers):
            mine = rest[i :: len(args.writers)]
            begun = time.perf_counter()
            with ThreadPoolExecutor(writers) as threads:
                results = list(threads.map(lambda unit: worker({"item": np.array([unit])}), mine))
            seconds = time.perf_counter() - begun
            assert not any(error for result in results for error in result["error"]), results
            found[f"capture, {writers} writers, tokens/s"] = len(mine) * tokens / seconds
        rates.append(forward(worker, some, args.device))
        found["bare forward, tokens/s"] = statistics.median(rates)

    job.run = run  # type: ignore[assignment]
    cache.capture(cfg)


def capture_with_ray(args: argparse.Namespace, cfg: CacheConfig, found: Found) -> None:
    """Capture by the command, and read what it says."""
    command = [
        *(sys.executable, str(REPO / "pipeline" / "cache.py"), "model=local", "model.name=random"),
        *(f"model.id={cfg.model.id}", "data=jsonl", f"data.path={cfg.data.path}", f"data.tokens={cfg.data.tokens}"),
        *(f"data.context={cfg.data.context}", "data.repeat=true", f"store.path={cfg.store.path}"),
        f"hookpoints=[{','.join(cfg.hookpoints)}]",
        f"store.unit_rows={cfg.store.unit_rows}",
    ]
    begun = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found["command, s"] = time.perf_counter() - begun
    if run.returncode:
        raise RuntimeError((run.stdout + run.stderr)[-2000:])
    said = job.runs(place_at(cfg.store.path))[-1]
    found["command, tokens/s after the first unit"] = said["tokens_per_second"]
    found["command, s of the job"] = said["seconds"]


def one_writer_gives_the_same(args: argparse.Namespace, folder: Path) -> bool:
    """Capture the first eighth again, one unit at a time, and compare every byte."""
    some = argparse.Namespace(**{**vars(args), "tokens": args.tokens // 8, "writers": [1]})
    capture_here(some, configured(some, folder / "model", folder / "one.zarr"), Found())
    again = [p.relative_to(folder / "one.zarr") for p in (folder / "one.zarr").rglob("*") if p.is_file()]
    units = [name for name in again if name.name != "zarr.json"]
    return all((folder / "one.zarr" / name).read_bytes() == (folder / "s.zarr" / name).read_bytes() for name in units)
