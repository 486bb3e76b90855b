"""Pages that show every latent of a run: RUN/features/index.html, a folder of static files that opens from disk.

    index.html *.js style.css        the same for every run (evals/features)
    data/table.js                    one row for each latent
    data/latents-N.js                what is shown of CHUNK latents; loaded when one of them is opened
    data/words.js                    the tokens' text
    data/match-N.js                  each latent's nearest latent in another coder

The data are JavaScript calls: a page on disk can load no other data files. Legend: M latents, V vocabulary.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipcoder.evals.core.by_side import largest_sides, norm_shares, read_diff
from skipcoder.evals.core.results import read as read_evaluation
from skipcoder.evals.explain.records import read_latents, read_summary
from skipcoder.evals.latents.examples import ExampleMaker, Window
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.trainer.run.run import Run

TEMPLATE = Path(__file__).with_name("site")
CHUNK, TOP, QUANTILES, WORDS, NEAREST, BINS = 64, 12, 10, 10, 6, 24
FEW_ENOUGH = 2**15
"""Latents up to which those that fire together are looked for: every pair of them is counted."""
Logit = tuple[int, float]
"""A token and what is added to its logit."""
BEFORE, AFTER = 9, 7
"""Tokens around the largest activation in a latent's preview."""
DENSE = 0.05
"""Share of tokens above which a latent comes late in the list."""


def write_pages(
    index: LatentIndex,
    maker: ExampleMaker,
    tokenizer: Any,
    model: nn.Module | None,
    others: Sequence[Run] = (),
    advance: Callable[[int], object] = lambda latents: None,
) -> Path:
    """Write the site. `model`: for the tokens that a latent promotes; `others`: coders to compare with, which have
    pages of their own."""
    run = index.run
    final, site = run.path / "features", run.path / "features.partial"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(TEMPLATE, site)
    (site / "data").mkdir()
    rows = _Rows()
    up_MK, down_MK = promoted(model, largest_sides(run.coder) if run.several else run.coder.W_dec)
    nearest = nearest_latents(run.coder.W_dec, run.coder.W_dec, NEAREST, same=True)
    together = firing_together(index) if index.width <= FEW_ENOUGH else [[] for _ in range(index.width)]
    used: set[int] = set()
    for first in range(0, index.width, CHUNK):
        part = []
        for latent in range(first, min(first + CHUNK, index.width)):
            firing = index.of(latent)
            largest = float(firing.value.max(initial=0))
            shown = dict(zip(("top", "quantiles"), maker.shown(latent, firing, TOP, QUANTILES), strict=True))
            used.update(int(token) for windows in shown.values() for window in windows for token in window.tokens)
            rows.add(firing.value, shown["top"], tokenizer)
            part.append({
                "n": len(firing.value), "largest": largest,
                "histogram": np.histogram(firing.value, BINS, (0, largest or 1))[0].tolist(),
                "up": [[text_of(tokenizer, t), round(logit, 3)] for t, logit in up_MK[latent]],
                "down": [[text_of(tokenizer, t), round(logit, 3)] for t, logit in down_MK[latent]],
                "together": together[latent],
                "nearest": [[int(j), round(float(c), 3)] for j, c in zip(*(x[latent] for x in nearest), strict=True)],
                **{name: [context(window, largest) for window in windows] for name, windows in shown.items()},
            })  # fmt: skip
        _write(site, f"latents-{first // CHUNK}", part)
        advance(len(part))
    _write(site, "table", _table(index, others, rows) | {"window": [maker.each_row, maker.size]})
    _write(site, "words", {token: text_of(tokenizer, token) for token in sorted(used)})
    for number, other in enumerate(others):
        latent_M1, cosine_M1 = nearest_latents(run.coder.W_dec, other.coder.W_dec, 1)
        match = {"latent": latent_M1[:, 0].tolist(), "cosine": [round(c, 3) for c in cosine_M1[:, 0].tolist()]}
        _write(site, f"match-{number}", match)
    shutil.rmtree(final, ignore_errors=True)
    site.rename(final)
    return final / "index.html"


@torch.no_grad()
def promoted(model: nn.Module | None, W_dec_ME: Tensor) -> tuple[list[list[Logit]], list[list[Logit]]]:
    """The tokens whose logits each latent raises and lowers most, and by how much for each unit of activation: its
    decoder row times the final norm's weights and the unembedding, ignoring the layers in between and the norm's
    denominator."""
    unembed_VE = unembedding(model, W_dec_ME.shape[1])
    if unembed_VE is None:
        none: list[list[Logit]] = [[] for _ in W_dec_ME]
        return none, none
    up: list[list[Logit]] = []
    down: list[list[Logit]] = []
    for rows in W_dec_ME.to(unembed_VE.device).split(256):
        logits = rows @ unembed_VE.T
        for found, largest in ((up, True), (down, False)):
            value, token = logits.topk(WORDS, largest=largest)
            found += [list(zip(*row, strict=True)) for row in zip(token.tolist(), value.tolist(), strict=True)]
    return up, down


def unembedding(model: nn.Module | None, width: int) -> Tensor | None:
    """[V, width] the final norm's weights times the unembedding; None of a model that has none of this width."""
    head = None if model is None else model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight.shape[1] != width:
        return None
    result: Tensor = head.weight.float() * _final_gain(model, width).to(head.weight.device)
    return result


def firing_together(index: LatentIndex) -> list[list[list[float]]]:
    """Of each latent, [latent, tokens on which both fire / tokens on which either does], the most first, in the first
    part of the text (latents/index.py)."""
    found = []
    for some in (np.arange(index.width)[i : i + 256] for i in range(0, index.width, 256)):
        overlap = index.overlap(some)
        overlap[np.arange(len(some)), some] = 0
        best = np.argsort(-overlap, axis=1, kind="stable")[:, :NEAREST]
        for row, latents in zip(overlap, best, strict=True):
            found.append([[int(i), round(float(row[i]), 3)] for i in latents if row[i] > 0])
    return found


def _final_gain(model: Any, width: int) -> Tensor:
    """The weights of the last norm; for an RMS norm, its output on ones, which is right for Gemma's 1 + w."""
    norms = [m for m in model.base_model.children() if "norm" in type(m).__name__.lower()]
    if not norms:
        return torch.ones(width)
    if getattr(norms[-1], "bias", None) is not None:
        gain: Tensor = norms[-1].weight.float()
        return gain
    ones = torch.ones(1, width, dtype=norms[-1].weight.dtype, device=norms[-1].weight.device)
    result: Tensor = norms[-1](ones)[0].float()
    return result


@torch.no_grad()
def nearest_latents(a_ME: Tensor, b_ME: Tensor, count: int, same: bool = False) -> tuple[Tensor, Tensor]:
    """(latents of b [M, count], cosines) nearest to each latent of a; `same`: a latent is not its own neighbour."""
    a, b = (nn.functional.normalize(w.detach().float().to(a_ME.device), dim=1) for w in (a_ME, b_ME))
    if a.shape[1] != b.shape[1]:
        return torch.zeros(len(a), count, dtype=torch.long), torch.zeros(len(a), count)
    found = []
    for start in range(0, len(a), 2048):
        cosine = a[start : start + 2048] @ b.T
        if same:
            cosine[torch.arange(len(cosine)), start + torch.arange(len(cosine))] = -2
        found.append(cosine.topk(min(count, len(b) - same)))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


class _Rows:
    """What the list shows of each latent, besides what a judge said."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        """The tokens on which it is largest in its windows, the most frequent first."""
        self.preview: list[list[str]] = []
        """Of its first window: what comes before the largest activation, that token, and what follows."""
        self.largest: list[float] = []
        self._peaks: list[tuple[int, float]] = []
        """Tokens on which it fires; the least of its windows' largest activations, as a multiple of its mean."""

    def add(self, value: np.ndarray, top: Sequence[Window], tokenizer: Any) -> None:
        """The next latent, its activations and its windows."""
        at = [int(window.activations.argmax()) for window in top]
        often = Counter(int(window.tokens[i]) for window, i in zip(top, at, strict=True)).most_common(3)
        self.tokens.append("  ".join(_line(text_of(tokenizer, token)) for token, _ in often))
        self.preview.append(
            [
                _line("".join(text_of(tokenizer, token) for token in top[0].tokens[part]))
                for part in (
                    slice(max(0, at[0] - BEFORE), at[0]),
                    slice(at[0], at[0] + 1),
                    slice(at[0] + 1, at[0] + AFTER),
                )
            ]
            if top
            else []
        )
        largest = float(value.max(initial=0))
        self.largest.append(float(f"{largest:.4g}"))
        least = min((float(window.activations.max()) for window in top), default=0.0)
        self._peaks.append((len(value), least / max(float(value.mean()), 1e-9) if len(value) else 0.0))

    def order(self, tokens: int, explanations: Sequence[str | None]) -> list[int]:
        """Latents worth looking at first: explained ones, then those that fire neither hardly ever nor very often, by
        how far all of their first windows are above their mean; of those that are largest on the same tokens one after
        another, each among others."""

        def peak(latent: int) -> tuple[bool, int, float]:
            n, above = self._peaks[latent]
            return explanations[latent] is None, 2 if n < TOP else int(n > DENSE * tokens), -above

        same: Counter[tuple[Any, ...]] = Counter()
        turn: dict[int, tuple[Any, ...]] = {}
        for latent in sorted(range(len(self._peaks)), key=peak):
            alike = (*peak(latent)[:2], self.tokens[latent].partition("  ")[0])
            turn[latent] = (*peak(latent)[:2], same[alike])
            same[alike] += 1
        return sorted(turn, key=lambda latent: turn[latent])


def _line(text: str) -> str:
    return text.replace("\n", "\u21b5").replace("\t", " ")


def _table(index: LatentIndex, others: Sequence[Run], rows: _Rows) -> dict[str, Any]:
    run, summary = index.run, index.run.summary
    columns: dict[str, list[Any]] = {name: [None] * index.width for name in ("explanation", "detection", "fuzzing")}
    judged = read_summary(run)
    for record in read_latents(run, judged["settings"]) if judged else []:
        columns["explanation"][record["latent"]] = record["explanation"]
        for scorer in columns.keys() & record["scores"].keys():
            columns[scorer][record["latent"]] = record["scores"][scorer]["balanced_accuracy"]
    tokens = index.tokens.size
    facts = f"{summary['kind'].replace('_', ' ')}, k {summary['k']}, {index.width:,} latents, {tokens:,} tokens of text"
    if "fvu" in (evaluation := read_evaluation(run)):
        facts += f", FVU {evaluation['fvu']:.3f}"
    if run.coder.W_skip is not None:
        facts += f"; the skip carries {_skip_share(index):.0%} of the squared length"
    warning = None
    if judged and not judged["calibration"]["usable"]:
        warning = f"The judge {judged['judge']} failed on planted latents: the scores on these pages say nothing."
    return {
        "title": f"{summary['model']} {summary['hookpoint']}, {run.path.name}", "weights": run.weights,
        "facts": facts, "warning": warning,
        "chunk": CHUNK, "density": [float(f"{n / tokens:.3g}") for n in index.counts], **columns,
        "tokens": rows.tokens, "preview": rows.preview, "largest": rows.largest,
        "order": rows.order(tokens, columns["explanation"]), **_sides(run),
        "others": [
            {"title": f"{o.path.name}: {o.summary['kind']} k={o.summary['k']} m={o.summary['width']}",
             "path": os.path.relpath(o.path / "features", run.path / "features")} for o in others
        ],
    }  # fmt: skip


def _sides(run: Run) -> dict[str, Any]:
    """Of a crosscoder its sides and each latent's shares of them; of one between two models also whose each is."""
    if not run.several:
        return {}
    sides = [f"{column.hookpoint} {column.side}" for column in run.writes]
    shares = [[round(share, 3) for share in row] for row in norm_shares(run.coder).tolist()]
    diff = read_diff(run)
    return {"sides": sides, "shares": shares} | ({} if diff is None else {"kind": diff["kind"]})


@torch.no_grad()
def _skip_share(index: LatentIndex) -> float:
    """The skip's share of the summed squared lengths of the skip's and the latents' outputs, over 1,024 tokens."""
    run, store = index.run, index.store
    start, stop = store.unit_range(store.units[0])
    stop = min(start + 1024, stop)
    x = run.rows(store, start, stop)
    flat = store.read("index", start, stop).astype(np.int64)
    kept = run.keeps(store, flat, index.tokens.ravel()[flat])
    x, coder = x[torch.from_numpy(kept)], run.coder
    affine = coder.skip_only(x)
    latents, skip = coder(x).y_hat - affine, affine - coder.b_dec
    return float(skip.square().sum() / (skip.square().sum() + latents.square().sum()))


def context(window: Window, largest: float) -> list[Any]:
    """[tokens, activations in tenths of the latent's largest, the window's largest, the window's number]."""
    tenths = np.ceil(10 * window.activations / max(largest, 1e-9)).clip(0, 10).astype(int).tolist()
    return [window.tokens.tolist(), tenths, round(float(window.activations.max(initial=0)), 4), window.number]


def text_of(tokenizer: Any, token: int) -> str:
    """A token's text, its spaces as they are."""
    result: str = tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
    return result


def _write(site: Path, name: str, content: Any) -> None:
    text = json.dumps(content, separators=(",", ":"))
    line = f"window.skipcoderTable = {text};" if name == "table" else f'window.skipcoderChunk("{name}", {text});'
    (site / "data" / f"{name}.js").write_text(line)
