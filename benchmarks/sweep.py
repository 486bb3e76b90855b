"""A sweep of eight as one bank: against the same eight one after the other, and against eai-sparsify on the fly.

    python benchmarks/sweep.py --store PATH [--tokens 200000]                          # one by one
    python benchmarks/sweep.py --store PATH --sparsify DIR [--tokens 32768]            # on the fly

Eight variants: two kinds, four k, 4,608 latents.

One by one: training only, taking turns in one process; every run must end with the same FVU both times. What is saved
is reading and decoding; on a CPU the steps are nearly all of the time.

On the fly: the commands that a user types, capture included (`pipeline/cache.py`, then `trainer/train.py -m`), against
eight fits of eai-sparsify's Trainer, each of which loads the model and runs it over the same training rows (shuffled,
since it does not shuffle tokens). On a CPU its Trainer takes no bfloat16 activations, so it gets the model in float32;
what the forward passes would have saved in bfloat16 is timed beside it and taken off its time. Both are judged on the
held-out units of PATH, which must be a store of the default text with more than 16 times TOKENS.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peer_sparsify
import torch

from skipcoder.evals.core.metrics import ReconstructionMetrics, Targets
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.store.attrs import model_config
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.bank import train_bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, Kind, LoopConfig, OptimConfig, SkipInit, StoreRef, TrainConfig
from skipcoder.trainer.data.stream import ActivationStream

REPO = Path(__file__).resolve().parent.parent
KINDS, KS, WIDTH, LR = (Kind.transcoder, Kind.skip_transcoder), (16, 32, 64, 128), 4608, 8e-3
THEIR_LR = 3.2e-2
"""Each library's best of those that benchmarks/quality.py tried: rates mean different things to the two."""
VARIANTS = list(itertools.product(KINDS, KS))
FLY_BATCH_ROWS = 4


def config(store: Path, tokens: int, kind: Kind, k: int) -> TrainConfig:
    """One of the eight."""
    return TrainConfig(
        store=StoreRef(str(store)),
        coder=CoderConfig(kind=kind, k=k, width=WIDTH),
        optim=OptimConfig(lr=LR),
        train=LoopConfig(tokens=tokens, save_every=10**6, eval_tokens=0),
    )


def one_by_one(store: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the bank and of eight runs."""
    seconds: dict[str, list[float]] = {"bank": [], "one by one": []}
    for _ in range(rounds):
        fvu = {}
        for way in seconds:
            with tempfile.TemporaryDirectory() as folder:
                jobs = [(config(store, tokens, *v), Path(folder) / str(i)) for i, v in enumerate(VARIANTS)]
                begun = time.perf_counter()
                outcomes = train_bank(jobs) if way == "bank" else [train_bank([job])[0] for job in jobs]
                seconds[way].append(time.perf_counter() - begun)
                fvu[way] = [outcome.summary["train_fvu"] for outcome in outcomes if outcome.summary]
        assert len(fvu["bank"]) == 8 and fvu["bank"] == fvu["one by one"]
    return seconds


class OnTheFly:
    """Both ways from text to eight coders."""

    def __init__(self, store: ActivationStore, tokens: int, folder: Path) -> None:
        self.tokens, self.folder, self.context = tokens, folder, store.context
        (self.hookpoint,) = store.hookpoints
        held_out = ActivationStream(store, self.hookpoint, 4096, split="test", epochs=1)
        self.held_out = [(batch.x, batch.y) for batch in held_out]
        self.model = model_config(store.attrs)

    def ours(self, seed: int) -> tuple[dict[str, float], list[float]]:
        """Seconds of capture and of training; held-out FVU of the eight."""
        path, runs = self.folder / f"{seed}.zarr", self.folder / f"runs{seed}"
        seconds = {}
        begun = time.perf_counter()
        _command("pipeline/cache.py", f"store.path={path}", f"data.tokens={self.tokens}")
        seconds["capture"] = time.perf_counter() - begun
        self.rows = np.concatenate([s.tokens(u) for s in [ActivationStore.open(path)] for u in s.split("train")])
        begun = time.perf_counter()
        _command(
            "trainer/train.py", "-m", f"store.path={path}", f"coder={','.join(map(str, KINDS))}",
            f"coder.k={','.join(map(str, KS))}", f"coder.width={WIDTH}", f"optim.lr={LR}", f"seed={seed}",
            f"coder.skip_init={SkipInit.zero.value}", f"train.tokens={self.rows.size}", "train.eval_tokens=0",
            f"train.batch_tokens={FLY_BATCH_ROWS * self.context}", f"hydra.sweep.dir={runs}",
        )  # fmt: skip
        seconds["bank"] = time.perf_counter() - begun
        return seconds, [self._fvu(SparseCoder.load(runs / str(i))) for i in range(len(VARIANTS))]

    @torch.no_grad()
    def _fvu(self, coder: SparseCoder) -> float:
        targets = Targets([coder.d_out])
        metrics = ReconstructionMetrics(coder.cfg.width, targets)
        for x, y in self.held_out:
            out = coder(x)
            metrics.update(targets.add(y), out.y_hat, out.values, out.indices)
        return float(metrics.result()["fvu"])

    def theirs(self, seed: int) -> tuple[dict[str, float], list[float]]:
        """Seconds of the eight fits; held-out FVU."""
        shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(self.rows)).long()
        seconds, fvu = 0.0, []
        for kind, k in VARIANTS:
            recipe = peer_sparsify.Recipe(kind, k, WIDTH, THEIR_LR, seed)
            silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
            with tempfile.TemporaryDirectory() as folder, silence[0], silence[1]:
                begun = time.perf_counter()
                trunk: Any = model.load_causal_lm(self.model, "cpu").base_model.float()
                coder = peer_sparsify.fit(trunk, self.hookpoint, shuffled, FLY_BATCH_ROWS, recipe, Path(folder))
                seconds += time.perf_counter() - begun
            x, y = (torch.cat(side) for side in zip(*self.held_out, strict=True))
            fvu.append(peer_sparsify.measure(coder, kind, x, y)["fvu"])
        some = shuffled[:32]
        slower = (self._forward(trunk, some) - self._forward(trunk.bfloat16(), some)) * len(shuffled) / len(some)
        return {"eight fits": seconds, "of it float32": len(VARIANTS) * max(slower, 0.0)}, fvu

    @torch.no_grad()
    def _forward(self, trunk: torch.nn.Module, rows: torch.Tensor) -> float:
        begun = time.perf_counter()
        for some in rows.split(FLY_BATCH_ROWS):
            trunk(some, use_cache=False)
        return time.perf_counter() - begun


def _command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=REPO, check=True, capture_output=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--sparsify", type=Path, help="where eai-sparsify is installed")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.sparsify is None:
        seconds = one_by_one(args.store, args.tokens or 200_000, args.rounds)
        median = {way: statistics.median(s) for way, s in seconds.items()}
        for way, s in median.items():
            print(f"{way:12}{s:8.1f} s   {s / median['bank']:.2f} x the bank")
        result: dict[str, object] = {"seconds": seconds}
    else:
        peer_sparsify.use(args.sparsify)
        rounds: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            fly = OnTheFly(ActivationStore.open(args.store), args.tokens or 32_768, Path(folder))
            for seed in range(args.rounds):
                (ours, our_fvu), (theirs, their_fvu) = fly.ours(seed), fly.theirs(seed)
                ratio = (theirs["eight fits"] - theirs["of it float32"]) / sum(ours.values())
                rounds.append({**ours, **theirs, "ratio": ratio, "our_fvu": our_fvu, "their_fvu": their_fvu})
                print(json.dumps(rounds[-1]), flush=True)
        print(f"on the fly takes {statistics.median(r['ratio'] for r in rounds):.2f} x the time")
        for i, (kind, k) in enumerate(VARIANTS):
            mine, other = (statistics.mean(r[side][i] for r in rounds) for side in ("our_fvu", "their_fvu"))
            print(f"{kind!s:16} k={k:<4} held-out FVU {mine:.4f} ours, {other:.4f} theirs")
        result = {"rounds": rounds}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
