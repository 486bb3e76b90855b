"""Which latents are of one model alone: on planted directions, on false ones, against the formulas, on real runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig, TaskName
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.tasks.model_diff import diff, model_diff
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, Kind
from skipcoder.trainer.run.run import Run
from tests.trainer.planted import Planted, side_facts
from tests.trainer.run.test_run import config

SHARED, NEW = 50, 10
NAMES = ["m", "other:m"]


@pytest.mark.slow
def test_planted_directions_of_the_tuned_model() -> None:
    """All ten are found, they come before all others, and nothing else is taken for one."""
    on = torch.ones(SHARED + NEW, 2, dtype=torch.bool)
    on[SHARED:, 0] = False
    world = Planted(on)
    coder = world.crosscoder(128, 2000, NAMES)
    found, tokens = diff(coder, (torch.cat(world.sides(4096), 1) for _ in range(8)))
    assert tokens == 8 * 4096
    direction, _ = world.nearest(coder)
    is_new = direction >= SHARED
    assert roc_auc_score(is_new[found.fires], found.relative_norm[found.fires]) >= 0.95
    kinds = Counter((bool(new), kind) for new, kind in zip(is_new, found.kinds, strict=True))
    assert kinds[True, "tuned"] == NEW
    assert not any("tuned" in kind or "base" in kind for new, kind in kinds if not new)


def two_latents() -> tuple[SparseCoder, torch.Tensor, torch.Tensor]:
    """A coder of orthogonal directions; rows that it explains but for what a test changes."""
    coder = SparseCoder(CoderConfig(kind=Kind.crosscoder, k=4, width=8), 32, 32).requires_grad_(False)
    coder.W_enc.zero_()
    coder.b_dec.zero_()
    for latent in range(8):
        coder.W_enc[latent, latent] = coder.W_enc[latent, 16 + latent] = 0.5
    coder.W_dec.copy_(2 * coder.W_enc)
    generator = torch.Generator().manual_seed(0)
    amount = (torch.rand(4000, 8, generator=generator) < 0.2) * (1 + torch.rand(4000, 8, generator=generator))
    amount = amount * (amount.cumsum(1).gt(0).cumsum(1) <= 100)
    rows = amount @ coder.W_dec
    moments = [Moments.of(part) for part in rows.split(16, 1)]
    coder.meta = {"sides": [side_facts(name, m) for name, m in zip(NAMES, moments, strict=True)]}
    return coder, rows, amount


def test_what_the_coder_left_out_of_the_base_model_is_no_difference() -> None:
    coder, rows, _ = two_latents()
    coder.W_dec[3, :16] = 0  # the base model has it; the coder does not say so
    rows[:, 5] = 0  # of this one the base model has nothing, and neither has the decoder
    coder.W_dec[5, :16] = 0
    coder.W_enc[5, 21] = 1.0
    found, _ = diff(coder, [rows])
    assert found.relative_norm[3] == found.relative_norm[5] == 1
    assert found.nu_error[3] > 0.8 and abs(found.nu_error[5]) < 0.1
    assert found.kinds[3] == "not only tuned" and found.kinds[5] == "tuned"
    assert all(kind == "shared" for latent, kind in enumerate(found.kinds) if latent not in (3, 5))


def test_what_another_latent_explains_of_the_base_model_is_no_difference() -> None:
    coder, rows, _ = two_latents()
    coder.W_dec[3, :16] = 0
    coder.W_dec[4, 16:] = 0  # 3 and 4 fire together: one has the tuned model's part, the other the base model's
    coder.W_dec[4, :16] = 0
    coder.W_dec[4, 3] = 1
    coder.W_enc[4] = coder.W_enc[3]
    found, _ = diff(coder, [rows])
    assert found.nu_error[3].abs() < 0.1 and found.nu_reconstruction[3] > 0.8
    assert found.kinds[3] == "not only tuned" and found.kinds[4] == "not only base"


def test_formulas_in_float64() -> None:
    """beta by least squares of f d on z, token by token."""
    on = torch.rand(20, 2, generator=torch.Generator().manual_seed(3)) < 0.7
    world = Planted(on | ~on.any(1, keepdim=True))
    coder = world.crosscoder(24, 60, NAMES)
    norms = torch.rand(24, 2, generator=torch.Generator().manual_seed(4)) ** 6
    coder.W_dec.mul_(norms.repeat_interleave(32, 1))
    x = torch.cat(world.sides(3000), 1)
    found, _ = diff(coder, x.split(1000))
    out = coder(x)
    f = torch.zeros(3000, 24, dtype=torch.float64).scatter_add_(1, out.indices, out.values.double())
    std = torch.tensor([side["variance"] ** 0.5 for side in coder.meta["sides"]]).repeat_interleave(32).double()
    W, z, z_hat = (t.double() / std for t in (coder.W_dec, x, out.y_hat))
    checked = 0
    for latent in range(24):
        r = float(found.relative_norm[latent])
        a, b = (float(part.norm()) for part in W[latent].split(32))
        assert r == pytest.approx((1 + (b - a) / max(a, b)) / 2, abs=1e-5)
        if 0.1 <= r <= 0.9 or not f[:, latent].any():
            assert torch.isnan(found.nu_error[latent])
            continue
        mine, their = (slice(32, 64), slice(0, 32)) if r > 0.9 else (slice(0, 32), slice(32, 64))
        design = torch.outer(f[:, latent], W[latent, mine]).flatten()
        for nu, target in (
            (found.nu_error, z - z_hat + torch.outer(f[:, latent], W[latent])),
            (found.nu_reconstruction, z_hat),
        ):
            beta = [float(design @ target[:, part].flatten() / (design @ design)) for part in (their, mine)]
            expected = beta[0] / beta[1] if beta[1] > 0 else float("inf")
            assert float(nu[latent]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        checked += 1
    assert checked >= 5


@pytest.mark.slow
def test_on_two_stores(store: ActivationStore, tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    """The second store is of the same model, so nothing is of one alone."""
    other = capture_here(cache_config(tmp_path / "other.zarr"))
    cfg = config(store, Kind.crosscoder)
    cfg.store.other = str(other.path)
    training.train(cfg, tmp_path / "run")
    (row,) = evaluate(EvaluateConfig(run=str(tmp_path / "run"), tasks=[TaskName.core, TaskName.diff], ce_tokens=128))
    assert row["diff_tuned_only"] == row["diff_base_only"] == 0 and row["diff_shared"] > 10
    found = json.loads((tmp_path / "run" / "diff.json").read_text())
    assert Counter(found["kind"])["shared"] == row["diff_shared"] and len(found["relative_norm"]) == 64
    assert len(row["sides"]) == 2 and row["sides"][1]["hookpoint"] == "other:layers.1.mlp"

    coder: Any = Run.open(tmp_path / "run")
    coder.coder.meta["sides"][0]["width"] -= 1
    with pytest.raises(UserError, match=r"both models must be equally wide"):
        next(model_diff(store, [coder]))

    training.train(config(store, Kind.sae), tmp_path / "sae")
    (row,) = evaluate(EvaluateConfig(run=str(tmp_path / "sae"), tasks=[TaskName.diff]))
    assert "train with coder=crosscoder store.other=PATH" in row["diff_problem"]
