"""Does the sparse step train the same coder as a plain dense one?

    python benchmarks/dense_reference.py --store PATH [--steps 200] [--device cuda] [--json OUT]

Trains each kind on a store with the kernels (one run for each mode of the encoder that the device has) and once with
the formulas written densely in float32 and differentiated by autograd; same seed, same order, same optimiser. Prints
the FVU on held-out tokens of each and its relative difference from the dense run's. `make demo` leaves a store at
runs/demo/store.zarr.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.activations.base import Step
from skipcoder.trainer.coder.encoding import available
from skipcoder.trainer.config import (
    CoderConfig,
    EncodeConfig,
    EncodeMode,
    Kind,
    LoopConfig,
    OptimConfig,
    SkipInit,
    TrainConfig,
)
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import make_learner
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.losses import Losses

BATCH = 4096


class DenseLearner(Learner):
    """The same training with dense products."""

    def losses(self, step: Step, x: Tensor, y: Tensor, batch_tokens: int) -> Losses:
        coder, variance = self.coder, batch_tokens * self.writes.variances[0]
        centred = x if coder.b_pre is None else x - coder.b_pre
        values, indices = torch.relu(centred @ coder.W_enc.T + coder.b_enc).topk(coder.cfg.k)
        f = x.new_zeros(len(x), coder.cfg.width).scatter(1, indices, values)
        y_hat = f @ coder.W_dec + coder.b_dec
        if coder.W_skip is not None:
            y_hat = y_hat + x @ coder.W_skip.T
        error = y - y_hat
        fvu = error.square().sum() / variance
        return Losses(fvu, {"fvu": fvu}, (f > 0).sum(0))


def train(
    cls: type[Learner], store: ActivationStore, kind: Kind, mode: EncodeMode, steps: int, device: str
) -> tuple[float, float]:
    """(held-out FVU, recall at the last check) of one run."""
    hookpoint = store.hookpoint(None)
    cfg = TrainConfig(
        coder=CoderConfig(kind=kind, k=32, width=4608, skip_init=SkipInit.zero),
        optim=OptimConfig(lr=2e-3),
        train=LoopConfig(tokens=steps * BATCH, batch_tokens=BATCH),
        encode=EncodeConfig(mode=mode),
    )
    base = make_learner(cfg, store, hookpoint, steps, device)
    if cls is DenseLearner:
        base.__class__, base.graphs, base.gradients.unsummed = cls, None, False
    for batch, _ in zip(ActivationStream(store, hookpoint, BATCH, device=device), range(steps), strict=False):
        base.step(batch.x, batch.y, batch.tokens)
    coder = base.folded()
    left = total = 0.0
    held = list(ActivationStream(store, hookpoint, BATCH, split="test", epochs=1))
    target = "y" if base.sides[1] == "output" else "x"
    mean = torch.cat([getattr(b, target) for b in held]).double().mean(0)
    with torch.no_grad():
        for batch in held:
            x, y = (batch.x if base.sides[0] == "input" else batch.y), getattr(batch, target)
            left += float((y.double() - coder(x).y_hat.double()).square().sum())
            total += float((y.double() - mean).square().sum())
    return left / total, base.recall


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the measurements here")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(2)
    store = ActivationStore.open(args.store)
    rows = []
    print(f"{'kind':16}{'step':12}{'held-out FVU':>14}{'against dense':>15}{'recall':>10}", flush=True)
    for kind in Kind:
        dense, _ = train(DenseLearner, store, kind, EncodeMode.float32, args.steps, args.device)
        print(f"{kind.value:16}{'dense':12}{dense:14.6f}", flush=True)
        rows.append({"kind": kind.value, "step": "dense", "fvu": dense})
        for mode in (mode for mode in EncodeMode if available(mode.value, args.device)):
            fvu, recall = train(Learner, store, kind, mode, args.steps, args.device)
            print(f"{kind.value:16}{mode.value:12}{fvu:14.6f}{fvu / dense - 1:+15.2e}{recall:10.6f}", flush=True)
            rows.append({"kind": kind.value, "step": mode.value, "fvu": fvu, "recall": recall})
    if args.json:
        args.json.write_text(
            json.dumps({"store": store.attrs["identity"], "steps": args.steps, "runs": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
