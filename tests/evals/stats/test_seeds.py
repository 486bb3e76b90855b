"""Matching of latents between seeds, and numbers over seeds."""

import pytest
import torch

from skipcoder.evals.stats.seeds import groups, over_seeds, shared_latents


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
