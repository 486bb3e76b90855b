"""Cross-entropy of a language model with one of its MLPs left alone, replaced or ablated.

Legend: B rows, T positions, E written width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from skipcoder.evals.splice import Site, splice
from torch import Tensor, nn

Replace = Callable[[Tensor], Tensor]


def ablation(value_E: Tensor) -> Replace:
    """A replacement by one constant vector, whatever comes in."""
    return lambda x_ND: value_E.expand(len(x_ND), -1)


@torch.no_grad()
def cross_entropy(
    model: nn.Module,
    tokens_BT: Tensor,
    batch_rows: int,
    replace: Replace | None = None,
    read: Site | None = None,
    write: Site | None = None,
    keep_BT: Tensor | None = None,
) -> float:
    """Mean nats per predicted token (all positions but each row's first), summed in float64.

    With `replace`, what passes `write` becomes replace(what passed `read`), except where `keep_BT` is True.
    """
    total, count = 0.0, 0
    for rows in _slices(len(tokens_BT), batch_rows):
        tokens = tokens_BT[rows]
        with ExitStack() as stack:
            if replace is not None:
                assert read is not None and write is not None
                keep = None if keep_BT is None else keep_BT[rows]
                stack.enter_context(splice(model, read, write, replace, keep))
            logits = model(tokens, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        total += float(losses.double().sum())
        count += losses.numel()
    return total / count


def recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """Share of what ablation costs that the splice keeps: 1 is as good as the model, 0 as bad as ablation. None where
    ablation costs nothing."""
    return None if ablated == clean else (ablated - spliced) / (ablated - clean)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, start + size)
