"""Every term of the loss against its formula, dense, in float64."""

from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind, LossConfig, TrainConfig
from skipcoder.trainer.data.ranks import ALONE
from skipcoder.trainer.run.build import check
from skipcoder.trainer.step.losses import Written, losses

N, D, M, K = 30, 6, 40, 3
DEAD = [1, 5, 8, 13, 21]


def problem(kind: Kind) -> tuple[SparseCoder, torch.Tensor, torch.Tensor]:
    coder = SparseCoder(CoderConfig(kind=kind, k=K, width=M), D, D).double()
    g = torch.Generator().manual_seed(1)
    for p in coder.parameters():
        p.data += torch.randn(p.shape, generator=g)
    x, y = (torch.randn(N, D, generator=g, dtype=torch.float64) for _ in range(2))
    return coder, x, y


def dense(coder: SparseCoder, x: torch.Tensor, y: torch.Tensor, sides: Written) -> dict[str, torch.Tensor]:
    """fvu, multi_topk and auxk as design section 3 writes them."""

    def decode(k: int, among: torch.Tensor, b_dec: torch.Tensor = coder.b_dec) -> torch.Tensor:
        pre = torch.relu((x if coder.b_pre is None else x - b_dec) @ coder.W_enc.T + coder.b_enc)
        values, indices = pre[:, among].topk(k)
        return torch.zeros_like(pre[:, among]).scatter(1, indices, values) @ coder.W_dec[among]

    everything = torch.arange(M)
    skip = 0 if coder.W_skip is None else x @ coder.W_skip.T
    error = y - decode(K, everything) - skip - coder.b_dec
    wide = y - decode(4 * K, everything) - skip - coder.b_dec
    most = sides.widths[0] // 2
    aux = error.detach() - decode(min(most, len(DEAD)), torch.tensor(DEAD), coder.b_dec.detach())
    terms = {"fvu": error, "multi_topk": wide / 8**0.5, "auxk": aux * (min(len(DEAD) / most, 1) / 32) ** 0.5}
    return {
        name: sum(
            (
                e.square().sum() / variance
                for e, variance in zip(term.split(sides.widths, 1), sides.variances, strict=True)
            ),
            torch.zeros(()),
        )
        / len(sides.widths)
        for name, term in terms.items()
    }


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("term", ["fvu", "multi_topk", "auxk"])
@pytest.mark.parametrize("sides", [Written([D], [7.0]), Written([2, 4], [7.0, 0.3])])
def test_terms_and_their_gradients(kind: Kind, term: str, sides: Written) -> None:
    coder, x, y = problem(kind)
    cfg, step = LossConfig(auxk=1 / 32, multi_topk=True), coder.activation.step(coder, K, ALONE)
    dead = torch.isin(torch.arange(M), torch.tensor(DEAD))
    _, terms, fired = losses(coder, cfg, step, x, y, sides, dead)
    expected = dense(coder, x, y, sides)[term]
    torch.testing.assert_close(terms[term], expected, rtol=1e-12, atol=0)
    assert fired.sum() == (coder.encode(x).values > 0).sum()  # what is counted are the k latents
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    mine = torch.autograd.grad(terms[term], list(coder.parameters()), **options)
    theirs = torch.autograd.grad(expected, list(coder.parameters()), **options)
    for (name, _), a, b in zip(coder.named_parameters(), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=f"{term}: gradient of {name}")
    if term == "auxk":
        W_enc_grad = mine[[name for name, _ in coder.named_parameters()].index("W_enc")]
        alive = torch.ones(M, dtype=torch.bool).index_fill(0, torch.tensor(DEAD), False)
        assert W_enc_grad[DEAD].any() and not W_enc_grad[alive].any()


def test_without_dead_latents_there_is_no_auxk() -> None:
    coder, x, y = problem(Kind.transcoder)
    step = coder.activation.step(coder, K, ALONE)
    total, terms, _ = losses(
        coder, LossConfig(auxk=1 / 32), step, x, y, Written([D], [1.0]), torch.zeros(M, dtype=torch.bool)
    )
    assert list(terms) == ["fvu", "auxk"] and terms["auxk"] == 0 and total == terms["fvu"]


def test_multi_topk_needs_an_order() -> None:
    with pytest.raises(UserError, match=r"loss.multi_topk needs coder.activation=topk, not groupmax"):
        check(
            TrainConfig(
                coder=CoderConfig(k=4, width=64, activation=ActivationName.groupmax), loss=LossConfig(multi_topk=True)
            )
        )
