"""Disentanglement on RAVEL's terms (arXiv 2402.17700): can latents exchange one attribute of an entity?

A prompt asks for an attribute of a city. At the city's last token the latents that a learned mask chooses are given the
values they have for another city: y becomes y + sum_i m_i (f'_i - f_i) W_dec_i, so skip and error stay. `cause`: how
often the model then says the other city's attribute; `isolation`: how often prompts for *other* attributes keep their
answer; the mean of both is the disentanglement. In the baseline all of y is exchanged.

The cities are from our own small table (ravel_cities.csv); only prompts that the model answers correctly by itself
count. Some cities train the mask, others test it; intervals resample cities.
Legend: B pairs, T positions, K latents, E width.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.evals.config import RavelConfig
from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.intervals import interval
from skipcoder.evals.tasks.texts import TextReader
from skipcoder.pipeline.model.sites import Site, replacing
from skipcoder.trainer.run.run import Run

TABLE = Path(__file__).with_name("ravel_cities.csv")
PROMPTS = {
    "country": "Tokyo is in Japan. Cairo is in Egypt. {} is in",
    "continent": "Tokyo is a city in Asia. Cairo is a city in Africa. {} is a city in",
    "language": "In Tokyo people speak Japanese. In Cairo people speak Arabic. In {} people speak",
}
RATE, TEMPERATURES = 0.05, (1.0, 0.01)
TRAIN_SHARE, LEAST = 0.7, 8


class Prompt(NamedTuple):
    """A prompt that the model answers correctly."""

    city: str
    attribute: str
    tokens: list[int]
    at: int
    """Position of the city's last token."""
    answer: int
    """First token of the attribute's value."""


class Pair(NamedTuple):
    """A prompt, and a prompt for the same attribute of another city."""

    base: Prompt
    source: Prompt


def known_prompts(model: nn.Module, reader: TextReader) -> list[Prompt]:
    """The prompts of the table that the model answers correctly."""
    found = []
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    for attribute, template in PROMPTS.items():
        before = len(reader.tokenizer(template.split("{}")[0].rstrip(), add_special_tokens=False).input_ids) + 1
        for row in rows:
            (tokens,) = reader.tokens([template.format(row["city"])])
            city = len(reader.tokenizer(" " + row["city"], add_special_tokens=False).input_ids)
            answer = reader.tokenizer(" " + row[attribute], add_special_tokens=False).input_ids[0]
            found.append(Prompt(row["city"], attribute, tokens, before + city - 1, answer))
    right = []
    for some in (found[i : i + 32] for i in range(0, len(found), 32)):
        said = _last_logits(model, some).argmax(-1).tolist()
        right += [prompt for prompt, token in zip(some, said, strict=True) if token == prompt.answer]
    return right


def pairs_of(prompts: Sequence[Prompt], attribute: str, count: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs that ask for `attribute`, pairs that ask for others). The source's city has another value of `attribute`;
    its prompt asks for the same attribute as the base, and has another answer."""
    by_key = {(p.city, p.attribute): p for p in prompts}
    value = {p.city: p.answer for p in prompts if p.attribute == attribute}
    rng = np.random.default_rng(0)
    cause, isolation = [], []
    for base in prompts:
        for city in sorted(value):
            source = by_key.get((city, base.attribute))
            if source is None or base.city not in value or value[city] == value[base.city]:
                continue
            if base.attribute == attribute:
                cause.append(Pair(base, source))
            elif source.answer != base.answer:  # else nothing could go wrong
                isolation.append(Pair(base, source))
    return tuple([some[i] for i in rng.permutation(len(some))[:count]] for some in (cause, isolation))  # type: ignore[return-value]


class Patch:
    """Exchanges latents at the cities' last tokens, for a batch of prompts."""

    def __init__(self, run: Run, model: nn.Module, reader: TextReader) -> None:
        self.run, self.model, self.reader = run, model, reader
        self._rows: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}

    def facts(self, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
        """(values [K], indices [K], y [E]) at the city's last token."""
        key = (prompt.city, prompt.attribute)
        if key not in self._rows:
            (batch,) = self.reader.read([prompt.tokens[: prompt.at + 1]], last_only=True)
            with torch.no_grad():
                out = self.run.coder(batch.sides[self.run.read_site.side])
            self._rows[key] = (out.values[0], out.indices[0], batch.sides[self.run.write_site.side][0])
        return self._rows[key]

    def logits(self, pairs: Sequence[Pair], mask_M: Tensor | None) -> Tensor:
        """Logits [B, V] after the exchange; without a mask all of y is exchanged."""
        base = [self.facts(pair.base) for pair in pairs]
        source = [self.facts(pair.source) for pair in pairs]
        y_BE = torch.stack([row[2] for row in base])
        if mask_M is None:
            new_BE = torch.stack([row[2] for row in source])
        else:
            # Lengths differ for batchtopk and jumprelu; padding with 0 adds nothing.
            values, indices = (
                nn.utils.rnn.pad_sequence(columns, batch_first=True)
                for columns in (
                    [torch.cat([s[0], -b[0]]) for b, s in zip(base, source, strict=True)],
                    [torch.cat([s[1], b[1]]) for b, s in zip(base, source, strict=True)],
                )
            )
            parts = (values * mask_M[indices])[:, :, None] * self.run.coder.W_dec[indices]
            new_BE = y_BE + parts.sum(1)
        return _last_logits(self.model, [pair.base for pair in pairs], self.run.write_site, new_BE)


def ravel(model: nn.Module, reader: TextReader, runs: Sequence[Run], cfg: RavelConfig) -> list[Result]:
    """For each run: `ravel_cause`, `ravel_isolation`, `ravel_disentangle` (means over attributes), and the same with
    all of y exchanged (`_dense`)."""
    prompts = known_prompts(model, reader)
    cities = np.random.default_rng(0).permutation(sorted({prompt.city for prompt in prompts}))
    taught = set(cities[: int(len(cities) * TRAIN_SHARE)])
    sets = {}
    for attribute in PROMPTS:
        train = pairs_of([p for p in prompts if p.city in taught], attribute, int(cfg.pairs * TRAIN_SHARE))
        test = pairs_of(
            [p for p in prompts if p.city not in taught], attribute, cfg.pairs - int(cfg.pairs * TRAIN_SHARE)
        )
        if min(map(len, (*train, *test))) >= LEAST:
            sets[attribute] = (train, test)
    if not sets:
        raise UserError(f"ravel: the model answers only {len(prompts)} of the prompts; it knows too few cities")
    results = []
    for run in runs:
        patch = Patch(run, model, reader)
        rows = []
        for attribute, (train, test) in sets.items():
            mask_M = _learn(patch, *train, cfg)
            rows.append({"attribute": attribute, "latents": int(mask_M.sum()), **_score(patch, *test, mask_M, "")})
            rows[-1] |= _score(patch, *test, None, "_dense")
        results.append(_summary(rows, len(prompts)))
    return results


def _learn(patch: Patch, cause: list[Pair], isolation: list[Pair], cfg: RavelConfig) -> Tensor:
    """The binary mask [M], learned as a sigmoid that grows steeper."""
    raw_M = torch.zeros(patch.run.coder.cfg.width, device=patch.run.coder.W_dec.device, requires_grad=True)
    optimiser = torch.optim.Adam([raw_M], lr=RATE)
    rng = np.random.default_rng(0)
    for step in range(cfg.steps):
        heat = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** (step / max(cfg.steps - 1, 1))
        loss = torch.zeros(())
        for some, of in ((cause, "source"), (isolation, "base")):
            batch = [some[i] for i in rng.choice(len(some), min(cfg.batch, len(some)), replace=False)]
            wanted = torch.tensor([getattr(pair, of).answer for pair in batch], device=raw_M.device)
            loss = loss + nn.functional.cross_entropy(patch.logits(batch, (raw_M / heat).sigmoid()).float(), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (raw_M.detach() > 0).float()


@torch.no_grad()
def _score(patch: Patch, cause: list[Pair], isolation: list[Pair], mask_M: Tensor | None, suffix: str) -> Result:
    def share(some: list[Pair], of: str) -> np.ndarray:
        said = [patch.logits(some[i : i + 32], mask_M).argmax(-1).cpu().numpy() for i in range(0, len(some), 32)]
        result: np.ndarray = np.concatenate(said) == [getattr(pair, of).answer for pair in some]
        return result

    def by_city(right: np.ndarray, some: list[Pair]) -> list[float] | None:
        city = np.unique([pair.base.city for pair in some], return_inverse=True)[1]
        pairs = np.bincount(city).astype(float)
        return interval(np.divide, np.bincount(city, right), pairs, sizes=pairs)

    caused, kept = share(cause, "source"), share(isolation, "base")
    return {
        f"cause{suffix}": float(caused.mean()),
        f"cause{suffix}_ci": by_city(caused, cause),
        f"isolation{suffix}": float(kept.mean()),
        f"isolation{suffix}_ci": by_city(kept, isolation),
        f"pairs{suffix}": len(cause) + len(isolation),
    }


def _summary(rows: list[Result], prompts: int) -> Result:
    result: Result = {"ravel_prompts": prompts, "ravel_attributes": [row["attribute"] for row in rows]}
    for suffix in ("", "_dense"):
        for name in ("cause", "isolation"):
            result[f"ravel_{name}{suffix}"] = float(np.mean([row[name + suffix] for row in rows]))
        result[f"ravel_disentangle{suffix}"] = (result[f"ravel_cause{suffix}"] + result[f"ravel_isolation{suffix}"]) / 2
    return result | {"ravel_details": rows}


def _last_logits(
    model: nn.Module, prompts: Sequence[Prompt], write: Site | None = None, new_BE: Tensor | None = None
) -> Tensor:
    """Logits [B, V] after each prompt; `new_BE`, if given, replaces what passes `write` at the cities."""
    device = next(model.parameters()).device
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(p.tokens) for p in prompts], batch_first=True).to(device)
    rows = torch.arange(len(prompts), device=device)
    last = torch.tensor([len(p.tokens) - 1 for p in prompts], device=device)
    if write is None or new_BE is None:
        with torch.no_grad():
            patched: Tensor = model(tokens, use_cache=False).logits[rows, last]
            return patched
    at = torch.tensor([p.at for p in prompts], device=device)
    keep_BT = torch.ones(tokens.shape, dtype=torch.bool, device=device)
    keep_BT[rows, at] = False

    def exchange(y_ND: Tensor) -> Tensor:
        new = y_ND.float().view(*tokens.shape, -1).clone()
        new[rows, at] = new_BE
        return new.view_as(y_ND)

    with replacing(model, write, write, exchange, keep_BT):
        result: Tensor = model(tokens, use_cache=False).logits[rows, last]
        return result
