"""Matching of latents between seeds, and numbers over seeds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from skipcoder.evals.stats.pairs import clear_best
from skipcoder.evals.stats.seeds import groups, over_seeds, seed_pairs, shared_latents
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


def test_differences_are_seed_by_seed() -> None:
    """Seeds that are good for one are good for the other: differences are clear where the means' intervals overlap."""
    rows = [
        {"configuration": name, "seed": seed, "fvu": luck + better}
        for name, better in (("a", 0.0), ("b", 0.01), ("c", 0.012))
        for seed, luck in enumerate((0.1, 0.2, 0.3 + better / 100))
    ]
    rows.append({"configuration": "control", "fvu": 0.0})

    def compared(rows: list[dict[str, Any]], alike: list[str]) -> list[dict[str, Any]]:
        return seed_pairs(rows, [row.get("seed") for row in rows], alike, ["fvu"])

    table = compared(rows, ["s"] * 10)
    assert [(row["run"], row["best"], row["seeds"]) for row in table] == [("b", "a", 3), ("c", "a", 3)]
    low, high = table[0]["difference_ci"]
    # t(1 - 0.05 / 3 / 2, 2) = 7.6488; differences 0.01, 0.01 and 0.0101
    half = 7.6488 * np.std([0.01, 0.01, 0.0101], ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((0.01 + 1e-4 / 3 - half, 0.01 + 1e-4 / 3 + half), abs=1e-8)
    assert clear_best(table) == {("fvu", "a")}
    one = [*rows, {"configuration": "d", "seed": 0, "fvu": 0.9}]  # one seed tells nothing: nor is there a clear best
    assert [row["difference_ci"] is None for row in compared(one, ["s"] * 11)] == [False, False, True]
    assert clear_best(compared(one, ["s"] * 11)) == set()
    assert compared(rows[:6], ["s"] * 3 + ["t"] * 3) == []  # of two stores
    assert compared(rows[::3], ["s"] * 4) == []  # no configuration has two seeds


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
