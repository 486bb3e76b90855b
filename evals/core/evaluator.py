"""Evaluate the coders of run directories on the test split: reconstruction from the store, cross-entropy from the
model. Runs of one store and hookpoint share the model and its clean and ablated passes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.evals.core.by_side import by_side
from skipcoder.evals.core.ce_kl import summary
from skipcoder.evals.core.metrics import ReconstructionMetrics, Targets
from skipcoder.evals.core.passes import Part, TokenLosses, token_losses
from skipcoder.evals.core.replacements import Key, ways
from skipcoder.evals.core.results import BY_DOCUMENT, Result
from skipcoder.pipeline.model import load as models
from skipcoder.pipeline.store.attrs import model_config
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text.rows import places
from skipcoder.progress import progress
from skipcoder.trainer.coder.cross_layer import CrossLayerTranscoder
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.outliers import moments
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.device import on_device
from skipcoder.trainer.run.run import Run

CE_TOKENS, CE_ROWS = 4096, 24
"""At least, by default: enough rows for intervals where each is of a document of its own."""

AT_ONCE = 8
"""Coders on the device at the same time."""


class Replacement(NamedTuple):
    """Parts of the model to replace, and a key that identifies the replacement."""

    key: Key
    parts: list[Part]


class Evaluator:
    """Evaluates runs of one store, several at once: in one pass over its test units, and in one pass of the model
    over `ce_tokens` of their tokens, in evenly spread rows."""

    def __init__(
        self,
        store: ActivationStore,
        ce_tokens: int | None,
        batch_rows: int,
        device: str,
        intervals: bool = True,
        every_position: bool = True,
    ) -> None:
        self.every_position = every_position
        self.store, self.batch_rows, self.device = store, batch_rows, device
        units = store.split("test")
        if not units:
            raise UserError(f"{store.place} has no finished test unit; finish the capture first")
        rows = np.concatenate([store.tokens(unit) for unit in units])
        ce_tokens = ce_tokens or max(CE_TOKENS, CE_ROWS * store.context)
        spread = np.linspace(0, len(rows) - 1, min(max(1, ce_tokens // store.context), len(rows))).astype(int)
        self.tokens_BT = torch.from_numpy(rows[spread]).long().to(device)
        self.row_numbers = torch.cat([torch.arange(*store.rows_of(unit)) for unit in units])
        self.ce_rows_B = self.row_numbers.numpy()[spread]
        documents, place = np.unique(np.concatenate([store.documents(unit) for unit in units]), return_inverse=True)
        self.documents = len(documents) if intervals else 0
        self._document_RT = torch.from_numpy(place.reshape(rows.shape).astype(np.int32))
        self.predicted_BT = place.reshape(rows.shape)[spread][:, 1:] if intervals else None
        """The document of each predicted token, int64 [B, T - 1]; None without intervals."""
        self.places_BT: Tensor | None = None
        if store.attrs["identity"]["data"].get("separate"):
            numbers = np.concatenate([store.read("document_number", *store.rows_of(unit)) for unit in units])
            self.places_BT = torch.from_numpy(places(numbers[spread])).to(device)
        self._shared: dict[Key | None, TokenLosses] = {}

    @cached_property
    def model(self) -> torch.nn.Module:
        """The whole language model."""
        model: torch.nn.Module = self.store.load_model(self.device)
        return model

    @cached_property
    def predicts(self) -> bool:
        """Whether the model predicts next tokens."""
        return models.predicts(model_config(self.store.attrs))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.store.load_tokenizer()

    def evaluate(self, runs: Sequence[Run]) -> Iterator[Result]:
        """Reconstruction and behaviour of each run in turn; AT_ONCE runs at a time. Call `Run.check` first."""
        for some in (runs[i : i + AT_ONCE] for i in range(0, len(runs), AT_ONCE)):
            begun = time.perf_counter()
            with on_device([run.coder for run in some], self.device):
                results = [
                    a | b | ({BY_DOCUMENT: a[BY_DOCUMENT] | b[BY_DOCUMENT]} if self.documents else {})
                    for a, b in zip(self.reconstruction(some), self.behaviour(some), strict=True)
                ]
            share = {"evaluation_seconds": round((time.perf_counter() - begun) / len(some), 2)}
            yield from (result | share for result in results)

    @torch.no_grad()
    def reconstruction(self, runs: Sequence[Run]) -> list[Result]:
        """ReconstructionMetrics on all test tokens that training would have kept."""
        every: dict[int, ReconstructionMetrics] = {}
        shares: dict[int, list[float]] = {}  # of the first batch
        streams = {(tuple(run.hookpoints), run.filter) for run in runs}
        for names, kept in sorted(streams, key=repr):
            mine = {i: run for i, run in enumerate(runs) if (tuple(run.hookpoints), run.filter) == (names, kept)}
            targets = {
                run.writes: Targets([self.store.width(*c) for c in run.writes], self.documents, self.device)
                for run in mine.values()
            }
            for i, run in mine.items():
                every[i] = ReconstructionMetrics(run.latents, targets[run.writes])
            stream = ActivationStream(
                self.store, names, 4096, split="test", filter=kept, epochs=1, device=self.device,
                columns={column for run in mine.values() for column in (*run.reads, *run.writes)},
            )  # fmt: skip
            with progress(f"reconstruction, {len(mine)} coders", len(self.row_numbers) * self.store.context) as advance:
                for batch in stream:
                    document = self._document(batch.position)
                    target = {writes: of_them.add(batch.row(writes), document) for writes, of_them in targets.items()}
                    for i, run in mine.items():
                        rows = batch.row(run.reads)
                        if isinstance(run.coder, CrossLayerTranscoder) and i not in shares:
                            shares[i] = run.coder.earlier_shares(rows)
                        out = run.coder(rows)
                        every[i].update(target[run.writes], out.y_hat, out.values, out.indices)
                    advance(len(batch.position))
        return [self._named(run, every[i], shares.get(i)) for i, run in enumerate(runs)]

    @staticmethod
    def _named(run: Run, metrics: ReconstructionMetrics, shares: list[float] | None) -> Result:
        """The metrics, with what is to be said of each side of a coder of several."""
        found = metrics.result()
        fvus = found.pop("sides", [{"fvu": found["fvu"], "fvu_ci": found["fvu_ci"]}])
        if shares is not None:
            fvus = [fvu | {"from_earlier": share} for fvu, share in zip(fvus, shares, strict=True)]
        return found | ({"sides": by_side(run.coder, metrics.fired_M, fvus)} if run.several else {})

    def _document(self, position_N: Tensor) -> Tensor | None:
        """int64 [N]: the documents of stored tokens, from 0; None without intervals."""
        if not self.documents:
            return None
        row = torch.searchsorted(self.row_numbers, position_N // self.store.context)
        return self._document_RT[row, position_N % self.store.context].long()

    def behaviour(self, runs: Sequence[Run]) -> list[Result]:
        """Cross-entropy and KL with the MLP replaced by the coder, by zero, by its mean and, for skip transcoders, by
        the affine skip alone, with positions that training left out unchanged and, with `every_position`, again
        (`_all`) with all positions replaced. Nothing but `ce_problem` of a model that predicts no next token."""
        if not self.predicts:
            problem = f"{self.store.attrs['model']['name']} predicts no next token, so there is no cross-entropy"
            print(problem, flush=True)
            return [{"ce_problem": problem, BY_DOCUMENT: {}} for _ in runs]
        if not all(run.stands_in for run in runs):
            why = "a crosscoder stands in for no one MLP, so there is no cross-entropy"
            others = iter(self.behaviour([run for run in runs if run.stands_in]))
            return [next(others) if run.stands_in else {"ce_problem": why, BY_DOCUMENT: {}} for run in runs]
        if not runs:
            return []
        replacements: dict[Key, list[Part]] = {}
        keys = []
        for run in runs:
            mine = self.replacements(run)
            keys.append({name: one.key for name, one in mine.items()})
            replacements |= {one.key: one.parts for one in mine.values()}
        new = {key: parts for key, parts in replacements.items() if key not in self._shared}
        losses = self._shared | self.losses(new)
        self._shared |= {key: of for key, of in losses.items() if key is None or key[0] in ("zero", "mean")}
        return [
            summary(losses[None], {name: losses[key] for name, key in mine.items()}, self.predicted_BT) for mine in keys
        ]

    def losses(self, replacements: Mapping[Key, Sequence[Part]]) -> dict[Key | None, TokenLosses]:
        """Losses of the chosen test rows under each replacement."""
        model, passes = self.model, 1 + len(replacements)
        with progress("cross-entropy", passes * self.tokens_BT.numel()) as advance:
            return token_losses(model, self.tokens_BT, self.batch_rows, replacements, advance, self.places_BT)

    def replacements(self, run: Run) -> dict[str, Replacement]:
        """{name in the results: the replacement}."""
        means = [
            torch.from_numpy(moments(self.store, *column, run.filter).mean).to(self.device, torch.float32)
            for column in run.writes
        ]
        positions: list[tuple[str, TokenFilter | None, Tensor | None]] = [("", run.filter, self._excluded(run))]
        if self.every_position:
            positions.append(("_all", None, None))
        return {
            f"{name}{suffix}": Replacement(
                (*way.key, kept),
                [
                    Part(read, write, replace, keep)
                    for read, write, replace in zip(run.read_sites, run.write_sites, way.replaces, strict=True)
                ],
            )
            for name, way in ways(run, means).items()
            for suffix, kept, keep in positions
        }

    def _excluded(self, run: Run) -> Tensor:
        """bool [B, T]: positions that the coder was not trained on."""
        position = self.ce_rows_B[:, None] * self.store.context + np.arange(self.store.context)
        kept = run.keeps(self.store, position.ravel(), self.tokens_BT.cpu().numpy().ravel())
        return torch.from_numpy(~kept).view(self.tokens_BT.shape).to(self.device)
