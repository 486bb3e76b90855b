"""Activations of several sides, made of sparse directions that are known, and crosscoders trained on them."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.files import SideFacts
from skipcoder.trainer.config import CoderConfig, Kind, LoopConfig, LossConfig, OptimConfig, TrainConfig
from skipcoder.trainer.step.learner import Learner

WIDTH, P, BATCH = 32, 0.05, 512


class Planted:
    """F directions, each on some of S sides: `on_FS` bool."""

    def __init__(self, on_FS: Tensor, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        direction_FSD = normalize(torch.randn(*on_FS.shape, WIDTH, generator=self.generator), dim=-1)
        self.direction_FSD = direction_FSD * on_FS[..., None]

    def sides(self, n: int, noise: float = 0.02) -> list[Tensor]:
        """[N, WIDTH] of each side: each direction is there on a twentieth of the tokens, 0.5 to 1.5 times."""
        features, sides, width = self.direction_FSD.shape
        amount = 0.5 + torch.rand(n, features, generator=self.generator)
        amount = amount * (torch.rand(n, features, generator=self.generator) < P)
        clean = torch.einsum("nf,fsd->snd", amount, self.direction_FSD)
        return list(clean + noise * torch.randn(sides, n, width, generator=self.generator))

    def crosscoder(self, width: int, steps: int, names: list[str], k: int = 3, seed: int = 0) -> SparseCoder:
        """A batchtopk crosscoder of them, for raw activations, with names for the sides."""
        cfg = TrainConfig(
            coder=CoderConfig(kind=Kind.crosscoder, k=k, width=width, activation="batchtopk"),
            optim=OptimConfig(lr=3e-3),
            loss=LossConfig(auxk=1 / 32),
            train=LoopConfig(tokens=steps * BATCH, batch_tokens=BATCH, dead_tokens=20 * BATCH),
            seed=seed,
        )
        sample = self.sides(8192)
        moments = [Moments.of(z) for z in sample]
        learner = Learner(cfg, moments, moments, steps, "cpu")
        for _ in range(steps):
            sides = self.sides(BATCH)
            learner.step(sides, sides, BATCH)
        learner.calibrate(sample, sample)
        coder = learner.folded().requires_grad_(False)
        coder.meta = {"sides": [side_facts(name, m) for name, m in zip(names, moments, strict=True)]}
        return coder

    def nearest(self, coder: SparseCoder) -> tuple[Tensor, Tensor]:
        """Of each latent the direction nearest to its decoder over all sides, and their cosine."""
        found = normalize(coder.W_dec, dim=1) @ normalize(self.direction_FSD.flatten(1), dim=1).T
        cosine, direction = found.max(1)
        return direction, cosine


def side_facts(name: str, moments: Moments) -> SideFacts:
    """What coder.json says of a side."""
    variance = float(moments.variance.sum())
    return {
        "hookpoint": name, "side": "output", "module": name, "width": len(moments.mean), "scale": 1.0,
        "variance": variance,
    }  # fmt: skip
