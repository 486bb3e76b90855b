"""What stands in for the MLPs of a coder: the coder itself, zero, the mean, or its skip alone.

A cross-layer transcoder stands in for the MLPs of all its layers at once: what a layer's latents write to later layers
waits until the forward pass comes there.

Legend: N tokens, D input width, E output width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipcoder.evals.core.passes import Replace, ablation
from skipcoder.trainer.coder.cross_layer import CrossLayerTranscoder
from skipcoder.trainer.run.run import Run

Key = tuple[Any, ...]


class Way(NamedTuple):
    """One way of replacing MLPs, at whatever positions."""

    key: Key
    """The first entry distinguishes ablations, which runs share, from coders."""
    replaces: Sequence[Replace]
    """One for each MLP, in the order of the layers."""


def ways(run: Run, means: Sequence[Tensor]) -> dict[str, Way]:
    """{name in the results: the way}. `means`: of what leaves each of the MLPs [E]."""
    coder, writes = run.coder, tuple(run.write_sites)
    layers = list(coder) if isinstance(coder, CrossLayerTranscoder) else [coder]
    device = layers[0].W_dec.device

    def there(function: Callable[[Tensor], Tensor]) -> Replace:
        return lambda x_ND: function(x_ND.to(device))

    def spliced(x_ND: Tensor) -> Tensor:
        y_hat_NE: Tensor = coder(x_ND).y_hat
        return y_hat_NE

    replaces = across(coder) if isinstance(coder, CrossLayerTranscoder) else [spliced]
    found = {
        "spliced": Way((run.path,), [there(replace) for replace in replaces]),
        "zero": Way(("zero", *writes), [ablation(torch.zeros_like(mean)) for mean in means]),
        "mean": Way(("mean", *writes, run.filter), [ablation(mean) for mean in means]),
    }
    if all(one.W_skip is not None for one in layers):
        found["skip_only"] = Way((run.path, "skip"), [there(one.skip_only) for one in layers])
    return found


def across(coder: CrossLayerTranscoder) -> list[Replace]:
    """What stands in for each layer's MLP, called in the order of the layers in every forward pass."""
    waiting: dict[int, Tensor] = {}

    def replace(layer: int, x_ND: Tensor) -> Tensor:
        if layer == 0:
            waiting.clear()
        one: Any = coder.layers[layer]
        for target, part in coder.to_later(layer, one.decode(one.encode(x_ND), x_ND)):
            waiting[target] = part if target not in waiting else waiting[target] + part
        return waiting.pop(layer)

    return [partial(replace, layer) for layer in range(len(coder.layers))]
