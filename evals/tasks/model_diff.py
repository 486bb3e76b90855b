"""Which latents of a crosscoder between two models belong to both, and which to one alone.

A latent's decoder has a part in each model; its relative norm says how much of it is in the second, the tuned one:

    r = (1 + (|d_tuned| - |d_base|) / max(|d_tuned|, |d_base|)) / 2        0: base alone, 1: tuned alone, 1/2: shared

That alone is not to be believed: a small d_base may also mean that the coder left the base model's part unexplained, or
gave it to other latents. Latent scaling (Minder et al., arXiv 2504.02922) asks how much of the latent is in either
model's activations, whatever the coder says. For a latent of the tuned model with d = d_tuned, in each model m

    beta_m = sum f (d . z_m) / (|d|^2 sum f^2)                              over tokens, f its activations
    nu     = beta_base / beta_tuned

once with z_m the error x_m - x^_m plus the latent's own f d_m (was it left unexplained?) and once with z_m = x^_m (do
other latents have it?). Both nu must be small. For latents of the base model the two change places.

Rows of each model are in standard deviations of their side. Legend: N tokens, M latents, D width of one model's row.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.evals.core.by_side import DIFF
from skipcoder.evals.core.results import Result
from skipcoder.files import write_atomically
from skipcoder.kernels.rows import gather_dot
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.progress import progress
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.data.joined import OTHER
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.run import Run

ONE_ALONE, SHARED = 0.9, 0.6
"""Relative norm above which a latent is of the tuned model alone (below 1 - this: of the base model), and up to which
(from 1 - this) it is shared."""
MOST_ERROR, MOST_RECONSTRUCTION = 0.2, 0.5
"""What nu must stay below for a latent to be of one model alone, with the error and with the reconstruction."""
TOKENS = 2**24
"""Training tokens that are looked at, at most."""
BASE, TUNED = 0, 1
NAMES = ("base", "tuned")


class Diff(NamedTuple):
    """What was found of each latent, on the CPU."""

    relative_norm: Tensor
    """[M], r."""
    nu_error: Tensor
    """[M], of latents of one model alone; NaN for others and where nothing fires."""
    nu_reconstruction: Tensor
    fires: Tensor
    """bool [M]."""

    @property
    def kinds(self) -> list[str]:
        """Of each latent: dead, shared, between, base, tuned or, where latent scaling does not confirm that, "not only
        base", "not only tuned"."""
        found = []
        for r, error, reconstruction, fires in zip(*(z.tolist() for z in self), strict=True):
            if not fires:
                found.append("dead")
            elif max(r, 1 - r) <= SHARED:
                found.append("shared")
            elif max(r, 1 - r) <= ONE_ALONE:
                found.append("between")
            else:
                confirmed = abs(error) < MOST_ERROR and abs(reconstruction) < MOST_RECONSTRUCTION
                found.append(("" if confirmed else "not only ") + NAMES[TUNED if r > ONE_ALONE else BASE])
        return found


def model_diff(store: ActivationStore, runs: Sequence[Run]) -> Iterator[Result]:
    """Compare the models that each run is a crosscoder between; write RUN/diff.json."""
    for run in runs:
        if run.other_path is None:
            raise UserError("for crosscoders between two models: train with coder=crosscoder store.other=PATH")
        if len({side["width"] for side in run.coder.meta["sides"]}) > 1:
            raise UserError("both models must be equally wide for a decoder direction of one to be sought in the other")
        device = run.coder.W_dec.device
        stream = ActivationStream(
            store, run.hookpoints, 4096, filter=run.filter, epochs=1, columns=run.reads, device=device
        )
        with progress("latent scaling", min(TOKENS, stream.tokens)) as advance:
            found, tokens = diff(run.coder, (batch.row(run.reads) for batch in stream), advance)
        kinds = found.kinds
        numbers = {name: [_rounded(x) for x in z.tolist()] for name, z in zip(found._fields[:3], found, strict=False)}
        models = [run.coder.meta["model"]["id"], run.coder.meta["other_model"]["id"]]
        content = {"weights": run.weights, "models": models, "tokens": tokens, "kind": kinds, **numbers}
        write_atomically(run.path / DIFF, json.dumps(content).encode())
        of = {"diff_shared": "shared", "diff_between": "between"}
        of |= {f"diff_{name}_only": name for name in NAMES} | {f"diff_not_only_{n}": f"not only {n}" for n in NAMES}
        yield {"diff_tokens": tokens} | {key: kinds.count(kind) for key, kind in of.items()}


@torch.no_grad()
def diff(
    coder: SparseCoder, rows: Iterable[Tensor], advance: Callable[[int], object] = lambda tokens: None
) -> tuple[Diff, int]:
    """Compare two models, given rows [N, D_in] of both; return how many were looked at, too."""
    sides = coder.meta["sides"]
    widths = [side["width"] for side in sides]
    std_D = torch.cat([torch.full((side["width"],), side["variance"] ** 0.5) for side in sides]).to(coder.W_dec.device)
    of_model = [[i for i, s in enumerate(sides) if s["hookpoint"].startswith(OTHER) == bool(m)] for m in (BASE, TUNED)]

    def parts(z_RD: Tensor) -> list[Tensor]:
        """Of both models, in standard deviations."""
        each = (z_RD / std_D).split(widths, 1)
        return [torch.cat([each[i] for i in mine], 1) for mine in of_model]

    d = parts(coder.W_dec)
    squares_M = coder.W_dec.new_zeros(coder.cfg.width, dtype=torch.float64)
    # [direction, model, M]: sums of f (d . z).
    error, reconstruction = (squares_M.new_zeros(2, 2, len(squares_M)) for _ in range(2))
    tokens = 0
    for x_ND in rows:
        x_ND = x_ND.float()
        codes = coder.encode(x_ND)
        y_hat_ND = coder.decode(codes, x_ND)
        values, order = codes.values, codes.by_latent
        squares_M += order.sum_weights(values.square())
        for total, of_both in ((error, parts(x_ND - y_hat_ND)), (reconstruction, parts(y_hat_ND))):
            for direction in (BASE, TUNED):
                for model in (BASE, TUNED):
                    dots = gather_dot(of_both[model], d[direction], codes.indices, codes.offsets)
                    total[direction, model] += order.sum_weights(values * dots)
        tokens += len(x_ND)
        advance(len(x_ND))
        if tokens >= TOKENS:
            break
    own = torch.stack([torch.stack([(a * b).sum(1).double() for b in d]) for a in d])  # d of direction . d of model
    error += own * squares_M
    norm_M2 = torch.stack([z.square().sum(1) for z in d], 1).sqrt()
    r = (1 + (norm_M2[:, TUNED] - norm_M2[:, BASE]) / norm_M2.amax(1).clamp_min(1e-30)) / 2

    def nu(total: Tensor) -> Tensor:
        # Where a latent is not even in its own model, nothing is confirmed.
        of_tuned, of_base = (
            torch.where(total[m, m] > 0, total[m, 1 - m] / total[m, m], torch.inf) for m in (TUNED, BASE)
        )
        found = torch.where(r > ONE_ALONE, of_tuned, torch.where(r < 1 - ONE_ALONE, of_base, torch.nan))
        return torch.where(squares_M > 0, found, torch.nan).float().cpu()

    return Diff(r.cpu(), nu(error), nu(reconstruction), (squares_M > 0).cpu()), tokens


def _rounded(x: float) -> float | None:
    return round(x, 4) if math.isfinite(x) else None
