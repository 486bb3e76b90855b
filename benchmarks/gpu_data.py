"""How fast does data move on this GPU: capture, store, stream? One dated Markdown and JSON file.

    python benchmarks/gpu_data.py --out benchmarks/ [--folder DIR] [--tokens 1048576] [--ray] [--layers 3 4 5 6 7 8]

A model of Llama-3.2-1B's shape with random weights (and 2,000 words) is captured into a store under DIR, in this
process by the worker that Ray would start, with --ray also by `pipeline/cache.py`; beside it, in the same run, the bare
forward pass that captures and drops, and what the disk writes and syncs. The store is recoded with lz4, and both are
streamed to the GPU from the page cache; then a lone coder of 16,384 latents is trained from the stream and on one
batch. Checked on the way: one writer gives the bytes of several, and the stream the batches of one on a CPU.
`--device cpu --tiny` tries all of it without a GPU.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcoder.pipeline import cache
from skipcoder.pipeline.capture import job
from skipcoder.pipeline.capture.worker import Worker, micro_batch_rows
from skipcoder.pipeline.config import CacheConfig, DataConfig, ModelConfig, RayConfig, SourceKind, StoreConfig
from skipcoder.pipeline.model.hooks import capture
from skipcoder.pipeline.store import recode
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import CoderConfig, Kind, LoopConfig, TrainConfig
from skipcoder.trainer.data import stream as streams
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.step.learner import Learner

REPO = Path(__file__).resolve().parent.parent
Found = dict[str, Any]


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
        **{"hidden_size": d, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": groups, "vocab_size": 2000, "bos_token_id": 0, "tie_word_embeddings": True},
    )
    torch.manual_seed(0)
    with torch.device(device):
        lm: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    lm.save_pretrained(folder)
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
    calls = args.writers

    def run(store: Any, attrs: Any, units: list[int], model: ModelConfig, _: RayConfig) -> None:
        begun = time.perf_counter()
        worker = Worker(store.address, model, os.cpu_count() or 1, args.device)
        found["worker ready after, s"] = time.perf_counter() - begun
        some = units[: max(1, len(units) // 4)]
        forward(worker, some[:2], args.device)
        rates = [forward(worker, some, args.device)]
        worker({"item": np.array(units[:1])})  # pinned memory, kernels
        rest = units[1:]
        begun = time.perf_counter()
        with ThreadPoolExecutor(calls) as threads:
            results = list(threads.map(lambda unit: worker({"item": np.array([unit])}), rest))
        seconds = time.perf_counter() - begun
        assert not any(error for result in results for error in result["error"]), results
        rates.append(forward(worker, some, args.device))
        tokens = attrs["identity"]["unit_rows"] * attrs["identity"]["context"]
        found["capture, tokens/s"] = len(rest) * tokens / seconds
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


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Read every epoch anew."""
    before, streams.KEEP_BYTES = streams.KEEP_BYTES, -1
    try:
        yield
    finally:
        streams.KEEP_BYTES = before


def streaming(store: ActivationStore, args: argparse.Namespace, readers: int | None = None) -> Found:
    """Tokens a second of the stream alone, from the page cache, after a first round."""
    hookpoint = next(iter(store.hookpoints))
    with nothing_kept():
        stream = ActivationStream(store, hookpoint, args.batch, device=args.device, readers=readers)
    batches, rates, total = iter(stream), [], stream.tokens
    for _ in range(4):
        wait(args.device)
        begun, tokens = time.perf_counter(), 0
        while tokens < total * 0.9:
            tokens += len(next(batches).x)
        wait(args.device)
        rates.append(tokens / (time.perf_counter() - begun))
    batches.close()
    return {"tokens/s": statistics.median(rates[1:]), "readers": stream.readers}


def lone_coder(store: ActivationStore, args: argparse.Namespace) -> Found:
    """Milliseconds of a step from the stream and on one batch, and the share spent waiting for data."""
    hookpoint = next(iter(store.hookpoints))
    with nothing_kept():
        stream = ActivationStream(store, hookpoint, args.batch, device=args.device)
    cfg = TrainConfig(
        coder=CoderConfig(kind=Kind.transcoder, k=32, width=256 if args.tiny else 16384),
        train=LoopConfig(tokens=10**9, batch_tokens=args.batch, log_every=10**9),
    )
    moments = [store.moments(hookpoint, side) for side in ("input", "output")]
    learner = Learner(cfg, *moments, 10**6, args.device, in_bfloat16=True)
    batches = iter(stream)
    steps = 3 if args.tiny else 60

    def turn(same: Any) -> float:
        wait(args.device)
        begun = time.perf_counter()
        for _ in range(steps):
            batch = same or next(batches)
            while len(batch.x) < args.batch:  # the short last one has no graph
                batch = next(batches)
            learner.step(batch.x, batch.y, args.batch)
        wait(args.device)
        return 1e3 * (time.perf_counter() - begun) / steps

    one = next(batches)
    turn(one)
    turn(None)
    alone: list[float] = []
    streamed: list[float] = []
    for _ in range(3):
        alone.append(turn(one))
        streamed.append(turn(None))
    batches.close()
    a, s = statistics.median(alone), statistics.median(streamed)
    return {
        "ms on one batch": a,
        "ms from the stream": s,
        "waiting": max(0.0, 1 - a / s),
        "tokens/s": args.batch / s * 1e3,
    }


def one_writer_gives_the_same(args: argparse.Namespace, folder: Path) -> bool:
    """Capture the first eighth again, one unit at a time, and compare every byte."""
    some = argparse.Namespace(**{**vars(args), "tokens": args.tokens // 8, "writers": 1})
    capture_here(some, configured(some, folder / "model", folder / "one.zarr"), {})
    again = [p.relative_to(folder / "one.zarr") for p in (folder / "one.zarr").rglob("*") if p.is_file()]
    units = [name for name in again if name.name != "zarr.json"]
    return all((folder / "one.zarr" / name).read_bytes() == (folder / "s.zarr" / name).read_bytes() for name in units)


def as_on_a_cpu(store: ActivationStore, args: argparse.Namespace) -> bool:
    """Compare batches of several pools with those of a stream on a CPU."""
    hookpoint = next(iter(store.hookpoints))
    here, there = (ActivationStream(store, hookpoint, 1000, device=d, pool_chunks=3) for d in ("cpu", args.device))
    return all(
        torch.equal(a.x, b.x.cpu()) and torch.equal(a.y, b.y.cpu()) and torch.equal(a.position, b.position)
        for a, b, _ in zip(here, there, range(12), strict=False)
    )


def measure(args: argparse.Namespace, folder: Path) -> Found:
    """Everything."""
    found: Found = {}
    cfg = configured(args, make_model(folder / "model", args.tiny, args.device), folder / "s.zarr")
    wide = 2 * sum(2 * (64 if args.tiny else 2048) for _ in args.layers)
    rates = [disk(folder, 2**25 if args.tiny else 2**32)]
    capture_here(args, cfg, found)
    if args.ray:
        with_ray = configured(args, folder / "model", folder / "ray.zarr")
        capture_with_ray(args, with_ray, found)
    rates.append(disk(folder, 2**25 if args.tiny else 2**32))
    found["one writer gives the same bytes"] = one_writer_gives_the_same(args, folder)
    store = ActivationStore.open(folder / "s.zarr")
    size = sum(facts["bytes"] for record in store.commits.values() for facts in record.shards.values())
    per_token = size / (store.rows * store.context)
    found["disk, MB/s"] = statistics.median(rates) / 1e6
    found["bytes per token"], found["of raw"] = per_token, per_token / wide
    found["disk, tokens/s"] = statistics.median(rates) / per_token
    found["capture / forward"] = found["capture, tokens/s"] / found["bare forward, tokens/s"]
    found["capture / disk"] = found["capture, tokens/s"] / found["disk, tokens/s"]
    found["batches are those of a CPU"] = as_on_a_cpu(store, args)
    if len(args.layers) == 1:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(recode.recode(store, place_at(folder / "lz4.zarr"), "lz4", threads.map))
        for name, path in (("zstd", "s.zarr"), ("lz4", "lz4.zarr")):
            one = ActivationStore.open(folder / path)
            for readers in (None, 8, 4) if not args.tiny else (None,):
                said = streaming(one, args, readers)
                found[f"stream, {name}, {said['readers']} readers, tokens/s"] = said["tokens/s"]
            found[f"lone coder, {name}"] = lone_coder(one, args)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script itself")
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--writers", type=int, default=4, help="ray.writers")
    parser.add_argument("--ray", action="store_true", help="also by cache.py")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--commit", default="unknown", help="for the report")
    parser.add_argument("--out", type=Path, help="folder for the dated files; without it, print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args, Path(folder))
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    about = {
        "card": card,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": args.commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "arguments": {key: str(value) for key, value in vars(args).items() if key in ("tokens", "layers", "writers")},
    }
    lines = [f"# Capture and stream on {card}", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| what | |", "|---|---|"]
    for key, value in found.items():
        shown = ", ".join(f"{k} {v:,.3g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.4g}"
        lines.append(f"| {key} | {shown} |")
    print("\n".join(lines))
    if args.out:
        name = f"gpu_data-{card.replace(' ', '-')}-{about['date']}"
        (args.out / f"{name}.json").write_text(json.dumps({"about": about, "found": found}, indent=1))
        (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
