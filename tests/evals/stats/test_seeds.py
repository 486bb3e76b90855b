"""Matching of latents between seeds, and numbers over seeds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from skipcoder.evals.stats.seeds import groups, over_seeds, shared_latents
from skipcoder.trainer.config import TrainConfig
from skipcoder.trainer.run.run import Run, RunDirectory


def test_the_same_latents_in_another_order_and_length_are_all_shared() -> None:
    torch.manual_seed(0)
    W = torch.randn(200, 64)
    assert shared_latents(W, 3 * W[torch.randperm(200)]) == 1
    assert shared_latents(W, torch.randn(200, 64)) == 0  # cosines of random vectors stay far from 0.7
    half = torch.cat([W[:100], torch.randn(100, 64)])
    assert shared_latents(W, half[torch.randperm(200)]) == pytest.approx(0.5, abs=0.02)
    # One to one: two copies of one latent are not both shared.
    assert shared_latents(W[:2], W[[0, 0]]) == 0.5


def test_means_and_intervals_over_seeds() -> None:
    same = {
        "hookpoint": "h",
        "kind": "sae",
        "k": 4,
        "width": 8,
        "activation": "topk",
        "side": "output",
        "configuration": "a",
    }
    rows = [{**same, "seed": seed, "fvu": fvu} for seed, fvu in enumerate((0.1, 0.2, 0.3))]
    rows.append({**same, "k": 8, "configuration": "b", "seed": 0, "fvu": 0.5, "fvu_ci": [0.4, 0.6]})
    assert groups(rows) == [[0, 1, 2], [3]]
    three, one = over_seeds(rows, [None] * 4)
    assert three["seeds"] == 3 and three["fvu"] == pytest.approx(0.2)
    # t(0.975, 2) = 4.3027; the deviation is 0.1
    assert three["fvu_ci"] == pytest.approx([0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5], abs=1e-5)
    assert one["fvu_ci"] == [0.4, 0.6] and one["seeds"] == 1


def test_seeds_are_those_of_the_start_and_of_the_order(tmp_path: Path) -> None:
    """And nothing that does not change what is learned makes another configuration."""

    def configuration(name: str, **changes: Any) -> str:
        cfg = OmegaConf.structured(TrainConfig())
        for key, value in {"run.dir": name, **changes}.items():
            OmegaConf.update(cfg, key, value)
        (tmp_path / name).mkdir()
        RunDirectory(tmp_path / name).write_config(cfg)
        none: Any = None
        return Run(tmp_path / name, none, none, "").configuration

    one = configuration("a")
    alike = {"stream.seed": 1, "seed": 1, "train.threads": 2, "train.save_every": 7, "stream.readers": 3}
    assert all(configuration(key, **{key: value}) == one for key, value in alike.items())
    for key, value in {"optim.lr": 1e-3, "stream.pool_chunks": 5, "encode.mode": "float32"}.items():
        assert configuration(key, **{key: value}) != one
