"""Trace prompts through a set of coders: the model, the set and the store that `python evals/circuit.py` works with."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.evals.circuits.attribution import attribute
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.evals.circuits.graph import Circuit, LayerFacts, circuit_of
from skipcoder.evals.circuits.interventions import verify
from skipcoder.evals.circuits.replacement import Replacement, layers_of
from skipcoder.evals.features.pages import text_of
from skipcoder.pipeline.model.load import predicts
from skipcoder.pipeline.store.attrs import model_config
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.progress import progress
from skipcoder.trainer.coder.coder_set import coder_folders
from skipcoder.trainer.run.device import pick_device
from skipcoder.trainer.run.run import Run


class Tracer:
    """A set of runs in their model, which runs in float32."""

    def __init__(self, cfg: CircuitConfig) -> None:
        self.cfg = cfg
        runs = [Run.open(path) for path in coder_folders(Path(cfg.run))]
        for run in runs:
            run.refuse_several("a circuit")
        stores = {run.store_path for run in runs}
        filters = {
            replace(run.filter, roles=None, max_norm=None, longest=None) for run in runs
        }  # lengths are each layer's own, and a prompt has no roles
        if len(stores) > 1 or len(filters) > 1:
            raise UserError(
                f"run={cfg.run}: its coders were trained on different stores or positions; train them alike"
            )
        self.runs = {run.summary["hookpoint"]: run for run in runs}
        if len(self.runs) < len(runs):
            raise UserError(f"run={cfg.run}: several coders of one hookpoint; a set has one of each")
        self.store, self.filter = ActivationStore.open(stores.pop()), filters.pop()
        if cfg.first_positions is not None:
            self.filter = replace(self.filter, first_positions=cfg.first_positions)
        for run in runs:
            run.check(self.store)
        self.device = pick_device(cfg.device, "device")
        self.name = self.store.attrs["model"]["name"]
        if not predicts(model_config(self.store.attrs)):
            raise UserError(f"{self.name} predicts no next token, so there is nothing to trace")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.store.load_tokenizer()

    @cached_property
    def model(self) -> Any:
        """The captured model, in float32. UserError if it is quantised."""
        if "quantization" in self.store.attrs["identity"]["model"]:
            raise UserError(f"{self.name} was captured with model.quantization, which circuits cannot follow")
        return self.store.load_model(self.device).float()

    @cached_property
    def layers(self) -> Any:
        """The model's layers, each with its coder."""
        coders = {name: run.coder.to(self.device) for name, run in self.runs.items()}
        return layers_of(coders, self.model, self.cfg.keep_missing)

    def ids(self, prompt: str) -> Tensor:
        """int64 [T] of a prompt, as rows of the store begin. UserError if it is too short or too long."""
        bos = self.store.attrs["bos"]
        ids = ([] if bos is None else [bos]) + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or len(ids)
        if not 2 <= len(ids) <= longest:
            raise UserError(
                f"the prompt has {len(ids):,} tokens; between 2 and {longest:,} can be traced: {prompt[:60]!r}"
            )
        return torch.tensor(ids, device=self.device)

    def targets(self) -> Tensor | None:
        """The tokens that `targets` asks for; UserError for one that is no single token."""
        if self.cfg.targets is None:
            return None
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.cfg.targets]
        for text, ids in zip(self.cfg.targets, found, strict=True):
            if len(ids) != 1:
                parts = ", ".join(repr(self.text(i)) for i in ids)
                raise UserError(
                    f"targets: {text!r} is {len(ids)} tokens ({parts}), not one; a space before it may be missing"
                )
        return torch.tensor(list(dict.fromkeys(ids[0] for ids in found)))

    def replacement(self, ids: Tensor) -> Replacement:
        """The replacement model on these tokens."""
        special = self.store.attrs["special_tokens"]
        kept = self.filter.keep(np.arange(len(ids)), ids.cpu().numpy(), len(ids), special)
        if not kept.any():
            raise UserError(
                f"all {len(ids)} tokens of the prompt are at positions that the coders' training left out; "
                "first_positions=1 leaves out one"
            )
        return Replacement(self.model, self.layers, ids, torch.from_numpy(~kept).to(self.device))

    def trace(self, prompt: str, replacement: Replacement) -> Circuit:
        """The pruned graph of a prompt and, if asked for, how well it predicts ablations."""
        cfg = self.cfg
        with progress("attribution", min(cfg.max_latents, replacement.active), "latents") as advance:
            found = attribute(
                replacement,
                targets=self.targets(),
                max_logits=cfg.max_logits,
                probability=cfg.probability,
                max_latents=cfg.max_latents,
                batch=cfg.batch,
                advance=advance,
            )
        ids: list[int] = replacement.ids_T.tolist()
        circuit = circuit_of(
            found,
            prompt=prompt,
            ids=ids,
            tokens=[self.text(token) for token in ids],
            left_out=replacement.left_out_T.nonzero()[:, 0].tolist(),
            model=self.name,
            layers=[self._facts(layer.hookpoint, layer.number) for layer in self.layers],
            node_threshold=cfg.node_threshold,
            edge_threshold=cfg.edge_threshold,
        )
        if cfg.verify:
            circuit["verified"] = verify(replacement, found, cfg.verify, batch=cfg.batch)
        return circuit

    def text(self, token: int) -> str:
        """A token's text."""
        return text_of(self.tokenizer, token)

    def _facts(self, hookpoint: str, number: int) -> LayerFacts:
        run = self.runs.get(hookpoint)
        width, path = (None, None) if run is None else (run.coder.cfg.width, str(run.path))
        return {"hookpoint": hookpoint, "number": number, "width": width, "run": path}


def prompts_of(cfg: CircuitConfig) -> Sequence[str]:
    """The prompts that are asked for: one, or the lines of a file."""
    if cfg.prompt is not None:
        return [cfg.prompt]
    file = Path(cfg.prompts or "")
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={file}: cannot be read ({error})") from None
    if not found:
        raise UserError(f"prompts={file}: holds no prompt; write one in each line")
    return found
