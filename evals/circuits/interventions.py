"""Switch latents off and compare what happens to the logits with what the graph predicts.

Predicted is what a latent contributes along all paths, with attention patterns, norms and the choice of latents held
fixed. Measured is the change in the model itself, and in the replacement model: coders in the MLPs' place, their errors
as on the prompt, everything else free to respond.

Legend: n ablations, B of them at once, T positions, E written width, V vocabulary, L logits, C sources.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import pearsonr
from torch import Tensor

from skipcoder.evals.circuits.attribution import Attribution
from skipcoder.evals.circuits.influence import normalised, partial_influence, total_effects
from skipcoder.evals.circuits.replacement import Layer, Replacement
from skipcoder.pipeline.model.sites import replacing

ALIKE = 10
"""Latents of most similar activation from which one is drawn beside each influential one."""


class Ablation(NamedTuple):
    """A latent to switch off at one position. `layer`: index of the replaced layer."""

    layer: int
    position: int
    latent: int
    activation: float


@torch.no_grad()
def logit_changes(
    replacement: Replacement, ablations: Sequence[Ablation], tokens: Tensor, real: bool, batch: int = 16
) -> Tensor:
    """[n, L] changes of these tokens' logits at the last position, less the mean logit, when each latent is switched
    off in the model itself (`real`) or in the replacement model."""
    plain = _logits(replacement, [None], tokens, real)
    found = [
        _logits(replacement, ablations[i : i + batch], tokens, real) - plain for i in range(0, len(ablations), batch)
    ]
    return torch.cat(found)


def _logits(replacement: Replacement, ablations: Sequence[Ablation | None], tokens: Tensor, real: bool) -> Tensor:
    """[B, L] with one ablation in each row."""
    ids = replacement.ids_T.expand(len(ablations), -1)

    def change(layer: Layer, number: int, activation: Callable[[int, Ablation], Any]) -> Tensor | None:
        """[B, T, E] what the ablations in this layer take away; None if there are none."""
        assert layer.coder is not None
        taken: Tensor | None = None
        for row, one in enumerate(ablations):
            if one is not None and one.layer == number:
                if taken is None:
                    taken = replacement.embedding_TD.new_zeros(*ids.shape, layer.coder.d_out)
                taken[row, one.position] -= activation(row, one) * layer.coder.W_dec[one.latent].to(taken.dtype)
        return taken

    def replaced(x_ND: Tensor, layer: Layer, number: int) -> Tensor:
        coder = layer.coder
        assert coder is not None
        out = coder(x_ND.to(coder.W_enc.dtype).view(*ids.shape, -1))
        y_hat = out.y_hat.to(x_ND.dtype) + replacement.errors[number]
        taken = change(
            layer,
            number,
            lambda row, one: out.values[row, one.position][out.indices[row, one.position] == one.latent].sum(),
        )
        return torch.flatten(y_hat if taken is None else y_hat + taken, 0, 1)

    with ExitStack() as stack:
        for number, layer in enumerate(replacement.layers):
            if layer.coder is None:
                continue
            if not real:
                stack.enter_context(
                    replacing(
                        replacement.model,
                        layer.read,
                        layer.write,
                        lambda x, layer=layer, number=number: replaced(x, layer, number),  # type: ignore[misc]
                        replacement.left_out[number].expand(len(ablations), -1),
                    )
                )
            elif (taken := change(layer, number, lambda row, one: one.activation)) is not None:
                stack.enter_context(
                    replacing(
                        replacement.model,
                        layer.read,
                        layer.write,
                        lambda x, taken=taken: taken.flatten(0, 1),  # type: ignore[misc]
                        adds=True,
                    )
                )
        logits = replacement.last_logits(ids)
    return logits[:, tokens] - logits.mean(-1, keepdim=True)


def verify(replacement: Replacement, found: Attribution, count: int, seed: int = 0, batch: int = 16) -> dict[str, Any]:
    """Ablate the `count` most influential latents and as many random ones of like activation. Returns, for the model
    (`real`) and the replacement model, the correlation of predicted and measured changes of the explained logits'
    mean, weighted by probability, with its 95 % interval; and the mean size of the changes. Latents of one prompt are
    not independent, and the interval is as if they were. Logits are measured as the model gives them, capped if it
    caps them."""
    logits, rows = len(found.logits), found.edges_RC
    share = normalised(found.probabilities).to(rows.dtype)
    order = partial_influence(rows, found.visited, share)[found.visited].argsort(descending=True)
    top = order[:count]
    others = order[count:]
    activation = found.values_R[logits:]
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    for number in top.tolist():
        free = others[~torch.isin(others, torch.tensor(drawn, dtype=others.dtype))]
        near = free[(activation[free] - activation[number]).abs().argsort()[:ALIKE]]
        if len(near):
            drawn.append(int(rng.choice(near.numpy())))
    chosen = found.visited[torch.tensor([*top.tolist(), *drawn], dtype=torch.long)]
    total_LC = total_effects(rows[:logits], rows[logits:], found.visited, activation)
    predicted = -(share @ total_LC)[chosen].double().numpy()
    latents = found.latents
    ablations = [
        Ablation(int(latents.layer[i]), int(latents.position[i]), int(latents.latent[i]), float(latents.activation[i]))
        for i in chosen.tolist()
    ]
    result: dict[str, Any] = {"influential": len(top), "random": len(drawn), "seed": seed}
    for name, real in (("real", True), ("replacement", False)):
        measured = np.zeros(0)
        if ablations:
            changes = logit_changes(replacement, ablations, found.logits.to(replacement.ids_T.device), real, batch)
            measured = (changes.cpu().to(share.dtype) @ share).double().numpy()
        result[name] = _correlation(predicted, measured) | {
            "change_influential": float(np.abs(measured[: len(top)]).mean()) if len(top) else None,
            "change_random": float(np.abs(measured[len(top) :]).mean()) if drawn else None,
        }
    return result


def _correlation(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Pearson's, with Fisher's 95 % interval; None where there are too few latents, or nothing changes."""
    if len(predicted) < 4 or not np.ptp(predicted) or not np.ptp(measured):
        return {"correlation": None, "correlation_ci": None}
    fit: Any = pearsonr(predicted, measured)
    low, high = fit.confidence_interval()
    return {"correlation": float(fit.statistic), "correlation_ci": [float(low), float(high)]}
