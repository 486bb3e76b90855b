"""Tokens a second of a capture: the whole job, the bare forward pass of the truncated model, SAELens' runner.

    python benchmarks/capture.py --store PATH [--tokens 65536] [--saelens DIR] [--rounds 3] [--json OUT]

PATH: a store of the default text and model with as many tokens; its rows are captured anew by the command that a user
types (one Ray worker), run through the same truncated model in the same micro-batches with nothing captured, and cached
by SAELens' CacheActivationsRunner, which stops after the hooked module, too, and writes one hook in float32: pairs take
two of its runs. Rounds take turns.
Loading is left out everywhere: the job's rate counts from its first unit on; its seconds as a whole stand beside it.
DIR: as for benchmarks/stream.py.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peer_saelens
import psutil
import torch

from skipcoder.pipeline.capture import job
from skipcoder.pipeline.capture.worker import hookpoints_of, micro_batch_rows
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.store.attrs import model_config
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore

REPO = Path(__file__).resolve().parent.parent


def whole_job(store: ActivationStore, tokens: int, *more: str) -> dict[str, Any]:
    """Run the command; what its log says, and the most memory that its worker took."""
    with tempfile.TemporaryDirectory(dir=store.path.parent) as folder:
        (Path(folder) / "tokens.zarr").symlink_to(store.path.resolve())  # so that none are made
        words = [f"store.path={folder}/s.zarr", f"data.tokens={tokens}", f"store.unit_rows={16384 // store.context}"]
        command = [sys.executable, "pipeline/cache.py", *words, *more]
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, worker_bytes(process.pid))
            time.sleep(0.5)
        assert process.returncode == 0
        (entry,) = job.runs(place_at(f"{folder}/s.zarr"))
    return {**entry, "worker_bytes": peak}


def worker_bytes(driver: int) -> int:
    """Resident memory of the process that holds the model."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            if process.cmdline() and "ray::MapWorker" in process.cmdline()[0]:
                return process.memory_info().rss
    return 0


@torch.no_grad()
def bare_forward(trunk: torch.nn.Module, rows_RT: torch.Tensor, at_once: int) -> float:
    """Tokens a second."""
    begun = time.perf_counter()
    for some in rows_RT.split(at_once):
        trunk(some, use_cache=False)
    return rows_RT.numel() / (time.perf_counter() - begun)


def saelens(lm: torch.nn.Module, tokenizer: Any, hook: str, width: int, rows: np.ndarray, at_once: int) -> float:
    """Tokens a second of one side."""
    silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, silence[0], silence[1]:
        runner = peer_saelens.cached(lm, tokenizer, hook, width, rows, at_once, Path(folder) / "cache")
        begun = time.perf_counter()
        found = runner.run()
        seconds = time.perf_counter() - begun
    return len(found) * rows.shape[1] / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--saelens", type=Path, help="where sae-lens is installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(torch.get_num_threads())
    store = ActivationStore.open(args.store)
    cfg, (hookpoint,) = model_config(store.attrs), hookpoints_of(store.attrs)
    at_once = micro_batch_rows(store.attrs["identity"]["micro_batch_tokens"], store.context)
    rows = store.read("tokens", 0, min(store.rows, args.tokens // store.context))
    trunk = model.load_trunk(cfg, [hookpoint], "cpu")
    bare_forward(trunk, torch.from_numpy(rows[:at_once]).long(), at_once)
    if args.saelens:
        peer_saelens.use(args.saelens)
        lm, tokenizer = model.load_causal_lm(cfg, "cpu"), model.load_tokenizer(cfg)
    rates: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        entry = whole_job(store, rows.size)
        found = {
            "job": entry["tokens_per_second"],
            "job with start": rows.size / entry["seconds"],
            "bare forward": bare_forward(trunk, torch.from_numpy(rows).long(), at_once),
        }
        if args.saelens:
            width = store.hookpoints[hookpoint.name]["d_out"]
            found["SAELens, a side"] = saelens(lm, tokenizer, f"model.{hookpoint.write}", width, rows, at_once)
            found["SAELens, pairs"] = found["SAELens, a side"] / 2
        for name, rate in found.items():
            rates.setdefault(name, []).append(rate)
        print({name: round(rate) for name, rate in found.items()}, f"{entry['worker_bytes'] / 1e9:.2f} GB", flush=True)
    for name, found_rates in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["job"], found_rates, strict=True))
        print(f"{name:15} {statistics.median(found_rates):8,.0f} tokens/s, job / this {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps(rates, indent=2))


if __name__ == "__main__":
    main()
