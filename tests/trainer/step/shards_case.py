"""What several processes learn together, saved for comparison: run by test_shards.py, alone or by torchrun.

python -m tests.trainer.step.shards_case OUT SHARDS DTYPE
"""

import sys
from pathlib import Path
from typing import Any

import torch

from skipcoder.kernels.encode import encode_batchtopk, encode_topk
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.coder.shard import EVERYWHERE, Shard
from skipcoder.trainer.config import (
    CoderConfig,
    EncodeConfig,
    EncodeMode,
    Kind,
    LoopConfig,
    LossConfig,
    OptimConfig,
    OptimName,
    TrainConfig,
)
from skipcoder.trainer.data.ranks import Ranks
from skipcoder.trainer.step import learner as learner_module
from skipcoder.trainer.step.learner import Learner
from tests.trainer.coders import ONE_BY_ONE

D, M, K, TOKENS, STEPS = 12, 64, 4, 96, 6

CASES: dict[str, dict[str, Any]] = {
    f"{kind} {activation}": {"kind": kind, "activation": activation}
    for kind in ONE_BY_ONE
    for activation in ("topk", "groupmax", "batchtopk", "jumprelu")
}
CASES |= {
    "auxk": {"kind": Kind.sae, "activation": "topk", "auxk": 1 / 32},
    "auxk batchtopk": {"kind": Kind.skip_transcoder, "activation": "batchtopk", "auxk": 1 / 32},
    "multi-topk": {"kind": Kind.transcoder, "activation": "topk", "multi_topk": True},
    "prefixes": {"kind": Kind.sae, "activation": "topk", "prefixes": [5, 40]},
    "prefixes multi-topk": {"kind": Kind.sae, "activation": "topk", "prefixes": [5, 40], "multi_topk": True},
    "signum": {"kind": Kind.sae, "activation": "topk", "optim": OptimName.signum},
    "k from 8": {"kind": Kind.transcoder, "activation": "topk", "k_start": 8},
    "micro-batches": {"kind": Kind.skip_transcoder, "activation": "topk", "micro_batches": 3},
    "bfloat16": {"kind": Kind.sae, "activation": "topk", "mode": EncodeMode.bfloat16},
    "scout": {"kind": Kind.sae, "activation": "topk", "mode": EncodeMode.scout},
}


def config(case: dict[str, Any], shards: int = 1) -> TrainConfig:
    return TrainConfig(
        coder=CoderConfig(
            kind=case["kind"], activation=case["activation"], k=K, width=M, prefixes=case.get("prefixes")
        ),
        loss=LossConfig(auxk=case.get("auxk", 0.0), multi_topk=case.get("multi_topk", False)),
        encode=EncodeConfig(mode=case.get("mode", EncodeMode.float32), nominated=3.0),
        optim=OptimConfig(name=case.get("optim", OptimName.adam), lr=1e-2, clip=0.01),
        train=LoopConfig(
            tokens=STEPS * TOKENS, batch_tokens=TOKENS, dead_tokens=2 * TOKENS, shards=shards, log_every=1,
            k_start=case.get("k_start"), k_anneal=0.9, micro_batches=case.get("micro_batches", 1),
        ),
    )  # fmt: skip


def batches() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(D, D, generator=generator)
    xs = [torch.randn(TOKENS, D, generator=generator) + 0.3 for _ in range(STEPS)]
    return [([x], [torch.relu(x @ mix)]) for x in xs]


def learn(case: dict[str, Any], ranks: Ranks, shards: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train, and return each step's results and the final state of all latents."""
    data = batches()
    cfg = config(case, shards)
    x, y = ([Moments.of(torch.cat([pair[i][0] for pair in data]))] for i in (0, 1))
    if cfg.coder.kind == Kind.crosscoder:  # over two sides
        data = [([], [y[:, :4], y[:, 4:]]) for _, (y,) in data]
        y = [Moments.of(torch.cat(side)) for side in zip(*(pair[1] for pair in data), strict=True)]
    learner = Learner(cfg, y if cfg.coder.reconstructs else x, y, STEPS, "cpu", ranks)
    lines = []
    for pair in data:
        mine = slice(ranks.data.rank, None, ranks.data.size)
        inputs, outputs = ([z[mine] for z in sides] for sides in pair)
        line = learner.step(inputs, outputs, TOKENS)
        lines.append({key: float(value) for key, value in line.items()} | {"dead": learner.dead})
    lines[-1]["held_out"] = learner.fvus(*data[0])[0]
    if learner.activation.calibration_tokens:
        learner.calibrate(*data[0])
    learner.coder.eval()
    state = dict(learner.coder.state_dict()) | {"since_fired": learner.since_fired_M, "density": learner.density_M}
    whole = {name: t if name in EVERYWHERE else torch.cat(list(ranks.latents.stack(t))) for name, t in state.items()}
    return lines, {name: t.clone() for name, t in whole.items()}


def choose(ranks: Ranks) -> dict[str, torch.Tensor]:
    """What fires of latents of which many are equal: their weights are small whole numbers."""
    generator = torch.Generator().manual_seed(2)
    x, W_enc = (torch.randint(-1, 2, (rows, 5), generator=generator).to(torch.get_default_dtype()) for rows in (40, M))
    shard = Shard(ranks.latents, M)
    mine = slice(shard.rows.start, shard.rows.stop)
    found = {}
    for name, encode in (("topk", encode_topk), ("batchtopk", encode_batchtopk)):
        codes = encode(x, W_enc[mine], torch.zeros(len(shard.rows)), K, peers=shard if ranks.latents.size > 1 else None)
        dense = torch.zeros(len(x), len(shard.rows)).index_put((codes.token, codes.indices), codes.values)
        found[name] = torch.cat(list(ranks.latents.stack(dense)), dim=1)
    return found


def main(out: str, shards: str, dtype: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    ranks = Ranks.join(int(shards))
    exact = dtype == "float64"  # has no cheaper search
    learned = {name: learn(case, ranks, int(shards)) for name, case in CASES.items() if not (exact and "mode" in case)}
    setattr(learner_module, "in_turns", lambda works: [work() for work in works])  # noqa: B010
    one_by_one = learn(CASES["micro-batches"], ranks, int(shards))
    torch.save({"learned": learned, "chosen": choose(ranks), "one by one": one_by_one}, Path(out) / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
