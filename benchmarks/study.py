"""What the studies share: runs that are evaluated as users' runs are, and intervals over seeds.

A study trains, judges every coder on held-out units, and leaves NAME.json, with every single result, and NAME.svg in
docs/studies/.
"""

import json
import platform
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import CoderConfig, Kind, LoopConfig, OptimConfig, SkipInit, StoreRef, TrainConfig
from skipcoder.trainer.run.build import make_learner, make_stream, token_filter
from skipcoder.trainer.run.provenance import provenance
from skipcoder.trainer.run.run import Run
from skipcoder.trainer.step.learner import Learner

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "skipcoder"  # the same picture from the same numbers

SEEDS = (0, 1, 2)
T_975 = 4.303
"""Student's t for a 95 % interval over three seeds."""
BATCH, CE_TOKENS = 4096, 4096
OUT = Path(__file__).resolve().parent.parent / "docs" / "studies"


def config(
    store: ActivationStore,
    tokens: int,
    seed: int,
    kind: Kind = Kind.transcoder,
    skip_init: SkipInit = SkipInit.zero,
    lr: float = 2e-3,
) -> TrainConfig:
    """4,608 latents, k = 32; `seed` is that of the coder and of the order."""
    cfg = TrainConfig(
        store=StoreRef(str(store.path)),
        coder=CoderConfig(kind=kind, k=32, width=4608, skip_init=skip_init),
        optim=OptimConfig(lr=lr),
        train=LoopConfig(tokens=tokens, batch_tokens=BATCH),
        seed=seed,
    )
    cfg.stream.seed = seed
    return cfg


def from_stream(cfg: TrainConfig, store: ActivationStore) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches as `trainer/train.py` would read them."""
    return ((batch.x, batch.y) for batch in make_stream(cfg, store, "cpu"))


def trained(cfg: TrainConfig, store: ActivationStore, batches: Iterable[tuple[Tensor, Tensor]]) -> Learner:
    """A coder after cfg.train.tokens tokens of raw pairs."""
    steps = cfg.train.tokens // BATCH
    learner = make_learner(cfg, store, store.hookpoint(None), max(steps, 1), "cpu")
    for _, (x, y) in zip(range(steps), batches, strict=False):
        learner.step(x.float(), y.float(), len(x))
    return learner


class Judge:
    """Evaluates on the held-out units of one store: reconstruction on all, cross-entropy on the first CE_TOKENS."""

    def __init__(self, store: ActivationStore) -> None:
        self.evaluator, self.store, self.hookpoint = Evaluator(store, CE_TOKENS, 4, "cpu"), store, store.hookpoint(None)

    def __call__(self, learner: Learner) -> dict[str, Any]:
        """FVU, dead fraction and the rest; cross-entropy (nats) with the MLP replaced at the positions trained on, by
        the coder and, where it has one, by its skip alone."""
        coder = learner.folded()
        coder.meta = provenance(self.store, [self.hookpoint], token_filter(learner.cfg, self.store), learner)
        summary: Any = {"hookpoint": self.hookpoint}
        run = Run(Path("-"), summary, coder, str(self.store.path))
        (result,) = self.evaluator.reconstruction([run])
        del result["density_histogram"]
        ways = self.evaluator.replacements(run)
        wanted = {(way,): [ways[way].parts[0]] for way in ("spliced", "skip_only") if way in ways}
        losses = self.evaluator.losses(wanted)
        names = {None: "clean", ("spliced",): "spliced", ("skip_only",): "skip_only"}
        return result | {f"ce_{names[key]}": float(of.ce_BT.mean()) for key, of in losses.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval."""
    assert len(values) == len(SEEDS)
    return statistics.mean(values), T_975 * statistics.stdev(values) / len(values) ** 0.5


def show(mean_half: tuple[float, float], digits: int = 4) -> str:
    """mean +- half width."""
    return f"{mean_half[0]:.{digits}f} ± {mean_half[1]:.{digits}f}"


def table(results: dict[str, list[dict[str, Any]]], baseline: str, keys: tuple[str, ...]) -> str:
    """Markdown: a row for each variant: mean and interval, and in brackets the difference from the baseline, seed by
    seed."""
    lines = [f"| variant | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, runs in results.items():
        cells = [name]
        for key in keys:
            cell = show(interval([run[key] for run in runs]))
            if name != baseline:
                differences = [run[key] - base[key] for run, base in zip(runs, results[baseline], strict=True)]
                mean, half = interval(differences)
                cell += f" ({mean:+.4f} ± {half:.4f})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def keep(name: str, store: ActivationStore, results: Any) -> None:
    """docs/studies/NAME.json: the results and where they were got."""
    OUT.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": store.attrs["model"]["name"],
        "hookpoint": store.hookpoint(None),
        "store_tokens": store.rows * store.context,
        "data": store.attrs["data"],
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "zarr")},
    }
    (OUT / f"{name}.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
