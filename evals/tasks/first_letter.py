"""The first-letter task for absorption.py: words of the model's own vocabulary after examples of spelling."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch

from skipcoder.errors import UserError
from skipcoder.evals.config import AbsorptionConfig
from skipcoder.evals.core.results import Result
from skipcoder.evals.tasks.absorption import LETTERS, Probes, Spelling, absorption, fit_probes, split_latents
from skipcoder.evals.tasks.texts import TextReader
from skipcoder.trainer.run.run import Run

_WORD = re.compile(r"[\u0120\u2581 ][A-Za-z]{2,}")
"""A space, as byte-level and SentencePiece vocabularies write it, then a word."""


def vocabulary(tokenizer: Any) -> dict[int, str]:
    """{token: word} for the tokens that are a space and a word in the Latin alphabet."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return {i: piece[1:] for i, piece in enumerate(pieces) if piece is not None and _WORD.fullmatch(piece)}


def prompts(reader: TextReader, words: dict[int, str], chosen: Sequence[int], examples: int) -> list[list[int]]:
    """Rows that end with the word: a causal model sees nothing after it. The examples are other words."""
    rng = np.random.default_rng(0)
    every = np.array(sorted(words))
    texts = []
    for token in chosen:
        others = [i for i in rng.choice(every, examples + 1, replace=False) if i != token][:examples]
        texts.append("".join(f" {words[i]} has the first letter: {words[i][0].upper()}\n" for i in others))
    return [[*row, token] for row, token in zip(reader.tokens(texts), chosen, strict=True)]


def first_letter(reader: TextReader, runs: Sequence[Run], cfg: AbsorptionConfig) -> list[Result]:
    """Absorption and splitting of each of the runs, all of one hookpoint; the model reads every word once."""
    words = vocabulary(reader.tokenizer)
    if len(words) < 200:
        raise UserError(f"absorption: the vocabulary holds only {len(words)} words of Latin letters; it takes 200")
    rng = np.random.default_rng(0)
    chosen = [int(i) for i in rng.permutation(sorted(words))[: cfg.words]]
    letter_W = np.array([LETTERS.index(words[token][0].lower()) for token in chosen])
    half = len(chosen) // 2
    batches = list(reader.read(prompts(reader, words, chosen, cfg.examples), last_only=True))
    order = torch.cat([batch.text_N for batch in batches]).argsort().cpu()
    sides = {
        side: torch.cat([batch.sides[side] for batch in batches]).cpu()[order].to(batches[0].text_N.device)
        for side in ("input", "output")
    }
    probes: dict[str, Probes] = {}
    results = []
    for run in runs:
        write = run.write_site.side
        y_WE = sides[write].double().cpu().numpy()
        if write not in probes:
            probes[write] = fit_probes(y_WE[:half], letter_W[:half], y_WE[half:], letter_W[half:])
        codes_WM, skip_WE = _codes(run, sides[run.read_site.side])
        split = {
            letter: split_latents(codes_WM[:half], letter_W[:half] == LETTERS.index(letter))[0]
            for letter in probes[write].letters
        }
        spelling = Spelling(codes_WM[half:], y_WE[half:], letter_W[half:])
        W_dec = run.coder.W_dec.detach().double().cpu().numpy()
        skip = None if skip_WE is None else skip_WE[half:]
        results.append(absorption(probes[write], spelling, W_dec, split, skip))
    return results


@torch.no_grad()
def _codes(run: Run, x_WD: torch.Tensor) -> tuple[scipy.sparse.csr_array, np.ndarray | None]:
    """Codes of each word [W, M], and what passes the skip [W, E]."""
    out = run.coder(x_WD)
    values, indices = out.values.double().cpu().numpy(), out.indices.cpu().numpy()
    word = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    active = values != 0
    where = (word[active].astype(np.int32), indices[active].astype(np.int32))  # liblinear takes no other integers
    codes = scipy.sparse.coo_array((values[active], where), shape=(len(values), run.coder.cfg.width)).tocsr()
    skip = run.coder.W_skip
    return codes, None if skip is None else (x_WD @ skip.T).double().cpu().numpy()
