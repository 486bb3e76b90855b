"""What the explorer computes: the latents of a text, and what the model writes when some of them are edited.

Legend: T tokens, K active latents of a token, M latents.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, FiniteFloat

from skipcoder.errors import UserError
from skipcoder.evals.splice.splice import Spliced, splice
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import Run

LONGEST, SHOWN, LIKELY = 1024, 60, 8
"""Tokens of a text; latents listed for a text; likely next tokens."""


class Edit(BaseModel):
    """What to do to a latent wherever the coder runs."""

    latent: Annotated[int, Field(ge=0)]
    how: Literal["ablate", "scale", "add", "set"]
    amount: FiniteFloat = 0.0


class Asked(BaseModel):
    """What a page asks for."""

    text: str
    other: str = ""
    """difference: the text to compare with."""
    edits: list[Edit] = []
    new_tokens: Annotated[int, Field(ge=1, le=200)] = 24
    replaced: bool = False
    """Put the coder in the MLP's place, instead of adding to the MLP's own output what the edits change."""


class Explorer:
    """One run's coder in its language model."""

    def __init__(self, run: Run, store: ActivationStore, device: str) -> None:
        run.refuse_several("the explorer")
        run.check(store)
        self.run, self.store, self.device = run, store, device
        self.hookpoint = run.summary["hookpoint"]
        self.coder = run.coder.to(device)
        self.model, self.tokenizer = store.load_model(device), store.load_tokenizer()
        self.special = set(store.attrs["special_tokens"]) if run.filter.special_tokens else set()
        self.pages = run.path / "features"
        self._table = _table(self.pages)

    def about(self) -> dict[str, Any]:
        """The title, and whether latents have pages."""
        summary = self.run.summary
        title = f"{summary['model']} {self.hookpoint}, {summary['kind'].replace('_', ' ')} k={summary['k']}"
        return {
            "title": f"{title}, {summary['width']:,} latents",
            "pages": bool(self._table),
        }

    @torch.no_grad()
    def annotate(self, text: str) -> dict[str, Any]:
        """The tokens of a text, what fires on each (latents and activations, largest first), and the latents that fire
        anywhere in it. Positions that training left out have none."""
        ids = self._ids(text)
        with self._spliced() as one:
            self.model.base_model(ids)
        values, order = one.values[0].sort(descending=True)
        indices = one.indices[0].gather(1, order)
        fires: list[list[tuple[int, float]]] = []
        left_out: list[int] = []
        for position, token in enumerate(ids[0].tolist()):
            kept = position >= self.run.filter.first_positions and token not in self.special
            kept = kept and not bool(one.long_BT[0, position])
            left_out += [] if kept else [position]
            pairs = zip(indices[position].tolist(), values[position].tolist(), strict=True) if kept else ()
            fires.append([(latent, round(value, 4)) for latent, value in pairs if value > 0])
        largest = _largest(fires)
        listed = sorted(largest, key=lambda latent: -largest[latent] / self._usual(latent))[:SHOWN]
        return {
            "tokens": [self.tokenizer.decode([token]) for token in ids[0].tolist()],
            "fires": fires,
            "left_out": left_out,
            "latents": [{"latent": i, "largest": largest[i]} for i in listed],
            "labels": {str(i): self.label(i) for i in largest},
        }

    @torch.no_grad()
    def continued(self, asked: Asked) -> dict[str, Any]:
        """How the model goes on, always with the likeliest token, as it is (`plain`) and with the edits (`edited`)."""
        ids = self._ids(asked.text, asked.new_tokens)
        found = {"plain": self._generate(ids, asked.new_tokens)}
        with self._spliced(not asked.replaced) as one:
            for edit in asked.edits:
                if edit.latent >= self.coder.cfg.width:
                    raise UserError(f"latent {edit.latent}: this coder has latents 0 to {self.coder.cfg.width - 1}")
                if edit.how == "ablate":
                    one.ablate(edit.latent)
                else:
                    getattr(one, edit.how)(edit.latent, edit.amount)
            found["edited"] = self._generate(ids, asked.new_tokens)
        return found

    def difference(self, text: str, other: str) -> dict[str, Any]:
        """Latents by how much more they fire, at their largest, in a text than in another, either way."""
        here, there = (_largest(self.annotate(one)["fires"]) for one in (text, other))
        gap = {i: here.get(i, 0.0) - there.get(i, 0.0) for i in here.keys() | there.keys()}
        order = sorted(gap, key=lambda i: -abs(gap[i]) / self._usual(i))[:SHOWN]
        return {
            "latents": [
                {"latent": i, "here": here.get(i, 0.0), "there": there.get(i, 0.0), "label": self.label(i)}
                for i in order
            ]
        }

    def label(self, latent: int) -> str:
        """Its explanation or, without one, the tokens on which it is largest; "" before its run has pages."""
        if not self._table:
            return ""
        return str(self._table["explanation"][latent] or self._table["tokens"][latent])

    def _usual(self, latent: int) -> float:
        """Its largest activation in the store: one that nears it is worth more than one of a latent that is often
        larger."""
        return max(float(self._table["largest"][latent]), 1e-9) if self._table else 1.0

    def _ids(self, text: str, new_tokens: int = 0) -> torch.Tensor:
        """int64 [1, T], as rows of the store begin, with room for new tokens in the model's context."""
        bos = self.store.attrs["bos"]
        ids = ([] if bos is None else [bos]) + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < 2:
            raise UserError("the text is too short: at least two tokens are needed")
        room = min(LONGEST, (getattr(self.model.config, "max_position_embeddings", None) or LONGEST) - new_tokens)
        if len(ids) > room:
            raise UserError(f"the text has {len(ids):,} tokens; at most {room:,} are read")
        return torch.tensor([ids], device=self.device)

    @contextmanager
    def _spliced(self, keep_error: bool = True) -> Iterator[Spliced]:
        coders = {self.hookpoint: self.coder}
        with splice(self.model, coders, keep_error=keep_error, special_tokens=self.special) as spliced:
            yield spliced[self.hookpoint]

    def _generate(self, ids: torch.Tensor, count: int) -> dict[str, Any]:
        written = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=self.tokenizer.eos_token_id or 0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        likely = written.logits[0][0].float().softmax(-1).topk(LIKELY)
        return {
            "text": self.tokenizer.decode(written.sequences[0, ids.shape[1] :]),
            "next": [
                [self.tokenizer.decode([token]), round(chance, 4)]
                for token, chance in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
            ],
        }


def _largest(fires: list[list[tuple[int, float]]]) -> dict[int, float]:
    """Each latent's largest activation."""
    found: dict[int, float] = {}
    for pairs in fires:
        for latent, value in pairs:
            found[latent] = max(value, found.get(latent, 0.0))
    return found


def _table(pages: Path) -> dict[str, Any]:
    """What the pages' list shows (features/pages.py); {} where there are none."""
    file = pages / "data" / "table.js"
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text().partition("=")[2].strip().removesuffix(";"))
    return found
