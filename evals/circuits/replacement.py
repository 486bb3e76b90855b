"""A model with coders in place of its MLPs, on one prompt, as a linear map from what is written into the residual
stream to what the coders read.

Where a coder was trained, an MLP's output is taken apart: active latents, skip, bias, and an error, the rest. With the
attention patterns and norm denominators of the prompt (frozen.py), the errors and the choice of latents held fixed, the
logits are the model's own. At positions that training left out the MLP's output is a constant.

Legend: T positions, D read width, E written width, K active latents, M latents, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.evals.circuits.frozen import Frozen
from skipcoder.evals.splice.splice import sites_of
from skipcoder.pipeline.model.sites import Site, replacing, watching
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import Kind

LINEAR = 1e-3
"""Largest departure from a straight line, as a share of the length of what is read, that rounding can explain."""


class Layer(NamedTuple):
    """One replaced MLP."""

    hookpoint: str
    number: int
    """Of the model's layer."""
    read: Site
    write: Site
    coder: SparseCoder | None
    """None: the MLP is left as it is, and all of its output is an error."""


class Linear(NamedTuple):
    """What a linear pass gives."""

    reads: list[Tensor]
    """[T, D] of each layer."""
    final: Tensor
    """[T, D] what enters the unembedding."""


def layers_of(coders: Mapping[str, SparseCoder], model: nn.Module, keep_missing: bool = False) -> list[Layer]:
    """The layers of a set of coders, one for each of the model's. UserError for coders that read their MLP's output,
    and for layers without a coder, unless `keep_missing`: then their MLPs are left as they are."""
    found: dict[int, Layer] = {}
    for name, coder in coders.items():
        if coder.cfg.kind == Kind.sae:
            raise UserError(
                f"the coder of {name} is an SAE, which does not compute what an MLP does: train transcoders"
            )
        read, write = sites_of(name, coder)
        numbers = re.findall(r"\.(\d+)\.", name)
        if len(numbers) != 1:
            raise UserError(f"hookpoint {name}: its name must hold the number of one layer, as layers.3.mlp does")
        number = int(numbers[0])
        if number in found:
            raise UserError(f"{name} and {found[number].hookpoint} are both of layer {number}: one coder per layer")
        found[number] = Layer(name, number, read, write, coder)
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    missing = [number for number in range(count) if number not in found]
    if missing and not keep_missing:
        raise UserError(
            f"layers {', '.join(map(str, missing))} of {count} have no coder: train them, or leave their MLPs as they "
            "are (keep_missing=true)"
        )
    like = next(iter(found.values()))
    for number in missing:
        name, reads, writes = (
            text.replace(f".{like.number}.", f".{number}.")
            for text in (like.hookpoint, like.read.module, like.write.module)
        )
        found[number] = Layer(name, number, Site(reads, like.read.side), Site(writes, like.write.side), None)
    return [found[number] for number in sorted(found)]


class Replacement:
    """One prompt in the replacement model."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], ids_T: Tensor, left_out_T: Tensor) -> None:
        """`left_out_T`: bool, positions where MLPs stay as they are."""
        self.model, self.layers, self.ids_T, self.left_out_T = model, list(layers), ids_T, left_out_T
        self.frozen = Frozen(model)
        self.embed: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._record()
        if len(self.frozen.patterns) != len(self.layers):
            raise UserError(
                f"{type(model).__name__}: {len(self.frozen.patterns)} of its {len(self.layers)} layers attend through "
                "transformers' attention interface; there is no rule for the others"
            )
        self._refuse_nonlinear()

    @torch.no_grad()
    def _record(self) -> None:
        ins: list[Tensor] = []
        outs: list[Tensor] = []
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(watching(self.model, layer.read, ins.append))
                stack.enter_context(watching(self.model, layer.write, outs.append))
            embedded: list[Tensor] = []
            stack.callback(self.embed.register_forward_hook(lambda m, a, out: embedded.append(out[0])).remove)
            stack.enter_context(self.frozen.held())
            self.logits_V: Tensor = self.last_logits(self.ids_T[None])[0]
        self.embedding_TD = embedded[0]
        self.left_out: list[Tensor] = []
        """bool [T] of each layer: positions where its MLP stays as it is."""
        self.values: list[Tensor] = []
        """[T, K] of each layer; 0 at positions left out."""
        self.indices: list[Tensor] = []
        self.vectors: list[Tensor] = []
        """[T, K, E] what each active latent writes."""
        self.errors: list[Tensor] = []
        """[T, E]"""
        self.constants: list[Tensor] = []
        """[T, E] what is written whatever is active: biases, and the outputs of MLPs at positions left out."""
        for layer, x_TD, y_TE in zip(self.layers, ins, outs, strict=True):
            coder, left_T = layer.coder, self.left_out_T
            if coder is not None and coder.longest is not None:
                left_T = left_T | (x_TD.norm(dim=1) > coder.longest[layer.read.side])
                left_T = left_T | (y_TE.norm(dim=1) > coder.longest[layer.write.side])
            self.left_out.append(left_T)
            kept_T1 = ~left_T[:, None]
            if coder is None:
                values, indices = x_TD.new_zeros(len(x_TD), 0), self.ids_T.new_zeros(len(x_TD), 0)
                vectors, affine_TE = y_TE.new_zeros(len(y_TE), 0, y_TE.shape[1]), torch.zeros_like(y_TE)
                bias_TE = torch.zeros_like(y_TE)
            else:
                if x_TD.shape[1] != coder.d_in or y_TE.shape[1] != coder.d_out:
                    raise UserError(f"the coder of {layer.hookpoint} is of another model: its widths differ")
                found, chosen = coder.encode(x_TD[~left_T].to(coder.W_enc.dtype)).padded()
                values = x_TD.new_zeros(len(x_TD), found.shape[1])
                indices = self.ids_T.new_zeros(values.shape)
                values[~left_T], indices[~left_T] = found.to(x_TD.dtype), chosen
                vectors = values[:, :, None] * coder.W_dec[indices].to(x_TD.dtype)
                bias_TE = coder.b_dec.to(x_TD.dtype).expand_as(y_TE)
                affine_TE = bias_TE + self._skip(layer, x_TD, left_T)
            self.values.append(values)
            self.indices.append(indices)
            self.vectors.append(vectors)
            self.errors.append((y_TE - vectors.sum(1) - affine_TE) * kept_T1)
            self.constants.append(torch.where(kept_T1, bias_TE, y_TE))

    def _skip(self, layer: Layer, x_TD: Tensor, left_T: Tensor) -> Tensor:
        """[T, E] what the layer's skip adds; 0 at positions left out."""
        if layer.coder is None or layer.coder.W_skip is None:
            return x_TD.new_zeros(())
        return (x_TD @ layer.coder.W_skip.to(x_TD.dtype).T) * ~left_T[:, None]

    @property
    def writes(self) -> list[Tensor]:
        """[T, E] of each layer: all that is written but the skip."""
        parts = zip(self.constants, self.vectors, self.errors, strict=True)
        return [constant + vectors.sum(1) + error for constant, vectors, error in parts]

    def last_logits(self, ids_BT: Tensor) -> Tensor:
        """[B, V] the model's logits at the last position, and no others: a vocabulary for every token is large."""
        handle = self.head.register_forward_pre_hook(lambda m, args: (args[0][:, -1:],))
        try:
            logits: Tensor = self.model(ids_BT, use_cache=False).logits
        finally:
            handle.remove()
        return logits[:, -1]

    @property
    def active(self) -> int:
        """How many latents are active, over all layers and positions."""
        return sum(int((values > 0).sum()) for values in self.values)

    def run(self, embedding: Tensor, writes: Sequence[Tensor]) -> Linear:
        """The linear pass: the embedding [T, D] and each layer's writes [T, E] replaced by these."""
        reads: list[Tensor] = []
        final: list[Tensor] = []

        def write(layer: Layer, written: Tensor, left_T: Tensor, x_TD: Tensor) -> Tensor:
            reads.append(x_TD)
            return written + self._skip(layer, x_TD, left_T)

        with ExitStack() as stack:
            for layer, written, left_T in zip(self.layers, writes, self.left_out, strict=True):
                stack.enter_context(
                    replacing(
                        self.model,
                        layer.read,
                        layer.write,
                        partial(write, layer, written, left_T),
                    )
                )
            stack.callback(self.embed.register_forward_hook(lambda m, a, out: embedding[None]).remove)
            stack.callback(self.head.register_forward_pre_hook(lambda m, a: final.append(a[0][0])).remove)
            stack.enter_context(self.frozen.held())
            self.last_logits(self.ids_T[None])
        return Linear(reads, final[0])

    @torch.no_grad()
    def _refuse_nonlinear(self) -> None:
        """Raise UserError if a pass half-way between nothing and the prompt is not half-way."""
        nothing = self.run(torch.zeros_like(self.embedding_TD), self.constants)
        half_way = [(a + b) / 2 for a, b in zip(self.constants, self.writes, strict=True)]
        half, whole = self.run(self.embedding_TD / 2, half_way), self.run(self.embedding_TD, self.writes)
        self.from_constants = nothing
        """What reaches each layer from biases and from positions left out."""
        names = [*(layer.hookpoint for layer in self.layers), "the unembedding"]
        for name, a, b, c in zip(names, *([*z.reads, z.final] for z in (nothing, half, whole)), strict=True):
            if not float((b - (a + c) / 2).abs().max()) <= LINEAR * float(c.abs().max()):  # also where it is no number
                raise UserError(
                    f"{type(self.model).__name__}: what {name} reads is not linear in what was written before it, with "
                    "attention patterns and norms fixed: a module on the way has no rule (evals/circuits/frozen.py)"
                )
