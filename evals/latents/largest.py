"""Where given latents are largest, without an index of all: a pass over the store with the rows of the encoder that
belong to them, then their coder on the texts so found. The language model does not run.

Legend: N tokens, L latents asked for, W windows of T tokens, K active latents.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from skipcoder.evals.latents.examples import Window
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import Run

SPARE = 4
"""Times as many texts are looked at: some have the same words, in some others of the coder's k latents win."""


@torch.no_grad()
def largest_windows(
    run: Run,
    store: ActivationStore,
    latents: Sequence[int],
    count: int,
    window: int,
    device: str,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[list[Window]]:
    """For each latent up to `count` windows of text in which it is largest, largest first."""
    coder, chosen = run.coder.to(device), torch.tensor(latents, device=device)
    W_LD, b_L = coder.W_enc[chosen], coder.b_enc[chosen]
    if coder.b_pre is not None:
        b_L = b_L - W_LD @ coder.b_pre
    size = min(window, store.context)
    each_row = store.context // size
    values, windows = [], []  # of each unit, [SPARE count, L]
    for unit in store.units:
        start, stop = store.unit_range(unit)
        x, at_N = _kept(run, store, start, stop, device)
        inside = (at_N % store.context) < each_row * size
        number_N = at_N // store.context * each_row + at_N % store.context // size
        order = np.argsort(number_N, kind="stable")
        order = order[inside[order]]
        distinct, first = np.unique(number_N[order], return_index=True)
        pre_NL = (x[torch.from_numpy(order).to(device)].float() @ W_LD.T + b_L).cpu().numpy()
        highest = np.maximum.reduceat(pre_NL, first, axis=0) if len(first) else pre_NL
        best = np.argsort(-highest, axis=0, kind="stable")[: SPARE * count]
        values.append(np.take_along_axis(highest, best, 0))
        windows.append(distinct[best])
        advance(stop - start)
    value, number = np.concatenate(values), np.concatenate(windows)
    asked: list[list[int]] = []
    for i in range(len(latents)):
        order = np.argsort(-value[:, i], kind="stable")[: SPARE * count]
        asked.append([int(number[j, i]) for j in order if value[j, i] > 0])
    shown = _encoded(run, store, asked, latents, size, each_row, device)
    return [_distinct(found)[:count] for found in shown]


def _kept(run: Run, store: ActivationStore, start: int, stop: int, device: str) -> tuple[torch.Tensor, np.ndarray]:
    """What the coder reads of a unit [N, D], and where it is in the text: row * context + position [N]."""
    flat = store.read("index", start, stop).astype(np.int64)
    rows = flat // store.context
    token = store.read("tokens", int(rows.min()), int(rows.max()) + 1)[rows - rows.min(), flat % store.context]
    keep = run.keeps(store, flat, token)
    x = run.rows(store, start, stop)
    return x[torch.from_numpy(keep)].to(device), flat[keep]


def _encoded(
    run: Run,
    store: ActivationStore,
    asked: Sequence[Sequence[int]],
    latents: Sequence[int],
    size: int,
    each_row: int,
    device: str,
) -> list[list[Window]]:
    """The windows asked for of each latent, with its activations as the coder chooses them."""
    of_unit: dict[int, set[int]] = {}
    unit_of_row = {row: unit for unit in store.units for row in range(*store.rows_of(unit))}
    for number in {number for numbers in asked for number in numbers}:
        of_unit.setdefault(unit_of_row[number // each_row], set()).add(number)
    tokens: dict[int, np.ndarray] = {}
    codes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for unit, some in of_unit.items():
        x, at_N = _kept(run, store, *store.unit_range(unit), device)
        first_row, end_row = store.rows_of(unit)
        place = np.full((end_row - first_row) * store.context, -1)
        place[at_N - first_row * store.context] = np.arange(len(at_N))
        text, numbers = store.tokens(unit), np.array(sorted(some))
        start_W = (numbers // each_row - first_row) * store.context + numbers % each_row * size
        there_WT = place[start_W[:, None] + np.arange(size)]
        out = run.coder(x[torch.from_numpy(there_WT.clip(0)).to(device)].float())
        value_WTK = np.where(there_WT[:, :, None] < 0, 0, out.values.cpu().numpy())
        for i, number in enumerate(numbers.tolist()):
            at = number % each_row * size
            tokens[number] = text[number // each_row - first_row, at : at + size]
            codes[number] = value_WTK[i], out.indices[i].cpu().numpy()
    result = []
    for latent, mine in zip(latents, asked, strict=True):
        found = []
        for number in mine:
            value, index = codes[number]
            found.append(Window(number, tokens[number], (value * (index == latent)).sum(1).astype(np.float32), "top"))
        result.append(sorted(found, key=lambda one: -float(one.activations.max())))
    return result


def _distinct(windows: Sequence[Window]) -> list[Window]:
    """Those in which the latent fires, each text once."""
    found: dict[bytes, Window] = {}
    for one in windows:
        if one.activations.max() > 0:
            found.setdefault(one.tokens.tobytes(), one)
    return list(found.values())
