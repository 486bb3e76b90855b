"""How much of each latent lies on each side that a coder writes.

A latent's share of a side is that side's part of its decoder norms, each measured in standard deviations of its side
(the root of the total variance of a token), so that a side with large activations has no advantage.

Legend: M latents, S sides.
"""

import json

import torch
from torch import Tensor
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.evals.core.results import Result
from skipcoder.records import checked
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.run.run import Run

DIFF = "diff.json"
EXCLUSIVE = 0.9
"""Share from which a latent belongs to one side alone."""


def decoder_norms(coder: SparseCoder) -> Tensor:
    """Length [M, S] of each latent's decoder on each side, in standard deviations of that side."""
    norms_MS = coder.side_norms()
    return norms_MS / torch.tensor([side["variance"] ** 0.5 for side in coder.meta["sides"]]).to(norms_MS)


def norm_shares(coder: SparseCoder) -> Tensor:
    """Each latent's shares [M, S], which add up to 1."""
    norms_MS = decoder_norms(coder)
    return norms_MS / norms_MS.sum(1, keepdim=True).clamp_min(1e-30)


def largest_sides(coder: SparseCoder) -> Tensor:
    """Decoder rows [M, E] of each latent on the side that has most of it, zero-padded where that is narrower; of a
    cross-layer transcoder the sum over the layers, all of which the residual stream gains."""
    if coder.cfg.over_layers:
        return coder.W_dec
    parts = coder.W_dec.detach().split([side["width"] for side in coder.meta["sides"]], 1)
    widest = max(z.shape[1] for z in parts)
    padded_MSE = torch.stack([torch.nn.functional.pad(z, (0, widest - z.shape[1])) for z in parts], 1)
    return padded_MSE[torch.arange(len(padded_MSE)), decoder_norms(coder).argmax(1)]


def by_side(coder: SparseCoder, fired_M: Tensor, fvus: list[Result]) -> list[Result]:
    """For each side its name and `fvus`, the mean share of the latents that fire, and how many of them are
    `exclusive` to it."""
    shares_MS = norm_shares(coder).to(fired_M.device)[fired_M > 0]
    return [
        {
            "hookpoint": facts["hookpoint"],
            "side": facts["side"],
            **fvu,
            "norm_share": float(shares_M.mean()) if len(shares_M) else None,
            "exclusive": int((shares_M >= EXCLUSIVE).sum()),
        }
        for facts, fvu, shares_M in zip(coder.meta["sides"], fvus, shares_MS.T, strict=True)
    ]


class DiffRecord(TypedDict):
    """RUN/diff.json: which latents of a crosscoder between two models belong to which (tasks/model_diff.py)."""

    weights: str
    models: list[str]
    tokens: int
    kind: list[str]
    relative_norm: list[float | None]
    nu_error: list[float | None]
    nu_reconstruction: list[float | None]


def read_diff(run: Run) -> DiffRecord | None:
    """Return what was found for the run's weights, if anything; UserError where the file is damaged."""
    file = run.path / DIFF
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); evaluate the run again with tasks=[diff]") from None
    record = checked(DiffRecord, found, str(file), "evaluate the run again with tasks=[diff]")
    return record if record["weights"] == run.weights else None
