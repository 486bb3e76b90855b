"""Ridge initialisation of the skip: the best affine map from x to y.

    W = C_yx (C_xx + lambda tr(C_xx)/d I)^-1,   b = mean(y) - W mean(x)

Legend: D input width, E output width.
"""

import hashlib
from contextlib import suppress

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.step.learner import Learner

LAMBDA = 1e-6
TOKENS_PER_DIMENSION = 64


@torch.no_grad()
def start_skip(learner: Learner, W_ED: Tensor, b_E: Tensor) -> None:
    """Start a learner's skip from the affine map y = W x + b of raw activations (before the first step)."""
    assert learner.coder.W_skip is not None
    s_in, s_out = learner.reads.scales[0], learner.writes.scales[0]
    learner.coder.W_skip.copy_(W_ED * (s_in / s_out))
    learner.coder.b_dec.copy_(b_E / s_out)


def ridge(
    store: ActivationStore,
    hookpoint: str,
    kept: TokenFilter,
    device: str = "cpu",
    per_dimension: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (W [E, D], b [E]) in float64 from training tokens of a store, `per_dimension` (null: 64) for each of D;
    kept beside it for later runs. The products are made on `device`."""
    per_dimension = per_dimension or TOKENS_PER_DIMENSION
    stream = ActivationStream(store, hookpoint, 8192, filter=kept, epochs=1, device=device)
    file = cache_file(store, stream, per_dimension)
    try:
        found = load(store.derived.read(file))
        return found["W"], found["b"]
    except (OSError, SafetensorError, KeyError):
        pass  # missing or incomplete: solved anew
    W, b = (t.cpu() for t in solve(stream, store.width(hookpoint, "input"), per_dimension=per_dimension))
    with suppress(OSError, UserError):  # where a (shared) store cannot be written, each run solves for itself
        store.derived.write(file, save({"W": W.contiguous(), "b": b.contiguous()}))
    return W, b


def cache_file(store: ActivationStore, stream: ActivationStream, per_dimension: int | None = None) -> str:
    """Return the name of the file beside the store, made from all that the solution depends on."""
    tokens = per_dimension or TOKENS_PER_DIMENSION
    found = f"{store.content} {stream.hookpoints} {stream.layout_hash()} {LAMBDA} {tokens}"
    key = hashlib.sha256(found.encode()).hexdigest()[:16]
    return f"ridge-{key}.safetensors"


def solve(
    stream: ActivationStream, d_in: int, lam: float = LAMBDA, per_dimension: int = TOKENS_PER_DIMENSION
) -> tuple[Tensor, Tensor]:
    """Return (W [E, D], b [E]) in float64 from `per_dimension` d_in filtered training tokens of `stream`, or as many as
    there are, but at least 64 d_in.

    Moments are centred on the mean of the first batch, which keeps the sums well conditioned, and corrected to the
    true mean at the end.
    """
    wanted = TOKENS_PER_DIMENSION * d_in
    n, shift_x, shift_y = 0, None, None
    sum_x = sum_y = xx = yx = torch.zeros(())
    for batch in stream:
        x, y = batch.x.double(), batch.y.double()
        if shift_x is None or shift_y is None:
            shift_x, shift_y = x.mean(0), y.mean(0)
            sum_x, sum_y = torch.zeros_like(shift_x), torch.zeros_like(shift_y)
            xx, yx = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(y.shape[1], x.shape[1])
        x, y = x - shift_x, y - shift_y
        n += len(x)
        sum_x, sum_y = sum_x + x.sum(0), sum_y + y.sum(0)
        xx += x.T @ x
        yx += y.T @ x
        if n >= per_dimension * d_in:
            break
    if n < wanted or shift_x is None or shift_y is None:
        raise UserError(
            f"coder.skip_init=ridge needs {wanted:,} training tokens, the store gives {n:,}; "
            "capture more, or leave it null"
        )
    c_xx = xx / n - torch.outer(sum_x, sum_x) / n**2
    c_yx = yx / n - torch.outer(sum_y, sum_x) / n**2
    c_xx.diagonal().add_(lam * c_xx.trace() / len(c_xx))
    W = torch.linalg.solve(c_xx, c_yx.T).T
    return W, (shift_y + sum_y / n) - W @ (shift_x + sum_x / n)
