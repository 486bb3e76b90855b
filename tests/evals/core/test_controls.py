"""Controls answer as coders do."""

from typing import Any

import pytest
import torch
from torch import nn

from skipcoder.errors import UserError
from skipcoder.evals.core.controls import Affine, Neurons


def test_all_neurons_are_the_mlp(lm: Any) -> None:
    mlp = lm.base_model.layers[1].mlp
    x = torch.randn(20, 24).bfloat16()
    wanted = mlp(x).float()
    all_of_them = Neurons(mlp, 1000, x)
    assert all_of_them.cfg.k == all_of_them.cfg.width == 48
    # bf16 rounds each of the 48 products' sum once: half a unit in the last place of the largest.
    torch.testing.assert_close(all_of_them(x.float()).y_hat, wanted, rtol=2**-8, atol=2**-8 * float(wanted.abs().max()))
    few = Neurons(mlp, 5, x)(x.float())
    assert few.values.shape == (20, 5)
    error = (few.y_hat - wanted).square().sum()
    assert 0 < error < (wanted - wanted.mean(0)).square().sum()
    # What is left out has a mean, which is no fault of the neurons that are kept.
    torch.testing.assert_close(few.y_hat.mean(0), all_of_them(x.float()).y_hat.mean(0))
    # Those chosen add the longest vectors.
    lengths = all_of_them(x.float())
    every = torch.zeros(20, 48).scatter_(1, lengths.indices, lengths.values.abs()) * all_of_them.W_dec.norm(dim=1)
    assert torch.equal(every.topk(5).values.sort().values, every.gather(1, few.indices).sort().values)


def test_neurons_of_an_mlp_that_ends_otherwise_are_refused() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.LayerNorm(4))
    with pytest.raises(UserError, match="not that of one linear map"):
        Neurons(mlp, 2, torch.randn(2, 4))


def test_affine_has_no_latents() -> None:
    W, b = torch.randn(6, 4), torch.randn(6)
    out = Affine(W.double(), b.double())(x := torch.randn(10, 4))
    torch.testing.assert_close(out.y_hat, x @ W.T + b)
    assert not out.values.any()


def test_neurons_leave_a_float32_model_as_it_is() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    before = [p.clone() for p in mlp.parameters()]
    Neurons(mlp, 2, torch.randn(50, 4))
    assert all(torch.equal(p, b) for p, b in zip(mlp.parameters(), before, strict=True))
