"""Evaluate the coders of run directories on held-out units: reconstruction from the store, cross-entropy from the
model. Runs of one store and hookpoint share the model, the clean and the ablated passes."""

import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from skipcoder.evals.crossentropy import Replace, ablation, cross_entropy, recovered
from skipcoder.evals.metrics import ReconstructionMetrics
from skipcoder.evals.splice import Site
from skipcoder.pipeline import model as models
from skipcoder.pipeline.cache import model_config
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.place import write_atomically
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer.coder import SparseCoder
from skipcoder.trainer.stream import ActivationStream, TokenFilter
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    path: Path
    summary: dict[str, Any]
    coder: SparseCoder
    store_path: str

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Read a run directory; UserError says what is missing."""
        if not path.is_dir():
            raise UserError(f"run={path}: no such directory")
        coder = SparseCoder.load(path)
        try:
            summary = json.loads((path / "summary.json").read_text())
            store = OmegaConf.load(path / "config.yaml").store.path
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is no finished run ({Path(error.filename).name} is missing); train it to its end"
            ) from None
        return cls(path, summary, coder, store)

    @property
    def filter(self) -> TokenFilter:
        """The positions this coder was trained on."""
        return TokenFilter(**self.coder.meta["data"]["filter"])

    def site(self, which: str) -> Site:
        """Where the coder reads or writes."""
        return Site(**self.coder.meta[which])


class Evaluator:
    """Everything that runs on one store share: the model, the held-out rows, clean and ablated cross-entropies."""

    def __init__(self, store: ActivationStore, ce_tokens: int, batch_rows: int, device: str) -> None:
        self.store, self.batch_rows, self.device = store, batch_rows, device
        units = store.split("held_out")
        if not units:
            raise UserError(f"{store.place} has no finished held-out unit; finish the capture first")
        rows = np.concatenate([store.tokens(unit) for unit in units])[: max(1, ce_tokens // store.context)]
        self.tokens_BT = torch.from_numpy(rows).long().to(device)
        self._shared: dict[tuple, float] = {}

    @cached_property
    def model(self) -> torch.nn.Module:
        """The whole language model, checked to be the one that was captured."""
        cfg = model_config(self.store.attrs)
        now, then = models.identity(cfg), self.store.attrs["identity"]["model"]
        if now != then:
            raise UserError(
                f"model {cfg.id} has changed since {self.store.place} was captured; restore it or capture anew"
            )
        return models.load_causal_lm(cfg, self.device)

    def evaluate(self, run: Run) -> dict[str, Any]:
        """All metrics of one run, as written to evaluation.json."""
        begun = time.perf_counter()
        if run.coder.meta["data"]["store_identity"] != self.store.attrs["identity_hash"]:
            raise UserError(f"{run.path} was trained on another capture than {self.store.place} now holds")
        coder = run.coder.to(self.device)
        result = self._reconstruction(run, coder)
        result |= self._cross_entropies(run, coder)
        return result | {"evaluation_seconds": round(time.perf_counter() - begun, 2)}

    @torch.no_grad()
    def _reconstruction(self, run: Run, coder: SparseCoder) -> dict[str, Any]:
        stream = ActivationStream(
            self.store,
            run.summary["hookpoint"],
            4096,
            split="held_out",
            filter=run.filter,
            epochs=1,
            device=self.device,
        )
        metrics = ReconstructionMetrics(coder.d_out, coder.cfg.width)
        for batch in stream:
            sides = {"input": batch.x, "output": batch.y}
            out = coder(sides[run.site("read").side])
            metrics.update(sides[run.site("write").side], out.y_hat, out.values, out.indices)
        return metrics.result()

    def _cross_entropies(self, run: Run, coder: SparseCoder) -> dict[str, Any]:
        """Twice each: with the positions that training left out passing unchanged, and (`_all`) at all positions."""
        write = run.site("write")
        classes = run.filter.classes
        mean = self.store.moments(run.summary["hookpoint"], write.side, positions=classes).mean
        mean_E = torch.from_numpy(mean).to(self.device, torch.float32)
        result: dict[str, Any] = {"ce_tokens": self.tokens_BT.numel(), "ce_clean": self._once(("clean",))}
        for suffix, keep in (("", self._excluded(run.filter)), ("_all", None)):
            mode = run.filter if keep is not None else None
            zero = self._once(("zero", write, mode), ablation(torch.zeros_like(mean_E)), run, keep)
            mean_ = self._once(("mean", write, mode, classes), ablation(mean_E), run, keep)
            spliced = self._ce(lambda x: coder(x).y_hat, run, keep)
            clean = result["ce_clean"]
            result |= {
                f"ce_spliced{suffix}": spliced,
                f"ce_zero{suffix}": zero,
                f"ce_mean{suffix}": mean_,
                f"ce_recovered_zero{suffix}": recovered(clean, spliced, zero),
                f"ce_recovered_mean{suffix}": recovered(clean, spliced, mean_),
            }
            if coder.W_skip is not None:
                skip_only = self._ce(coder.skip_only, run, keep)
                result[f"ce_skip_only{suffix}"] = skip_only
                result[f"ce_recovered_zero_skip_only{suffix}"] = recovered(clean, skip_only, zero)
        return result

    def _once(
        self, key: tuple, replace: Replace | None = None, run: Run | None = None, keep: Tensor | None = None
    ) -> float:
        if key not in self._shared:
            self._shared[key] = self._ce(replace, run, keep)
        return self._shared[key]

    def _ce(self, replace: Replace | None, run: Run | None, keep: Tensor | None) -> float:
        read, write = (run.site("read"), run.site("write")) if run else (None, None)
        return cross_entropy(self.model, self.tokens_BT, self.batch_rows, replace, read, write, keep)

    def _excluded(self, filter: TokenFilter) -> Tensor:
        """bool [B, T]: positions the coder was not trained on."""
        tokens = self.tokens_BT.cpu().numpy().ravel()
        kept = filter.keep(np.arange(tokens.size), tokens, self.store.context, self.store.attrs["special_tokens"])
        return torch.from_numpy(~kept).view(self.tokens_BT.shape).to(self.device)


def write_result(run: Run, result: dict[str, Any]) -> None:
    """evaluation.json in the run directory."""
    write_atomically(run.path / "evaluation.json", json.dumps(result, indent=2).encode())
