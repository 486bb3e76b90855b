"""Run a language model with coders in place of its MLPs: read latents, edit them, see what they do.

    with skipcoder.splice(model, {"layers.10.mlp": coder}) as spliced:
        spliced["layers.10.mlp"].ablate(7)
        model.generate(**inputs)

Legend: B rows, T positions, N = B T tokens, K active latents, M latents, E written width.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.pipeline.model.sites import Site, replacing
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import Kind

Edit = Callable[[Tensor], Tensor]


class Spliced:
    """A coder in a model: what its latents were in the last forward pass, and how they are edited in the next."""

    values: Tensor
    """[B, T, K] activations in the last forward pass, before edits."""
    indices: Tensor
    """int64 [B, T, K] the latents of `values`."""
    y_hat: Tensor
    """[N, E] what was written, edits included."""

    def __init__(self, coder: SparseCoder) -> None:
        self.coder = coder
        self.edits: list[tuple[int, Edit, int | None]] = []

    def edit(self, latent: int, function: Edit, position: int | None = None) -> None:
        """From now on, replace the latent's activation v [N] (0 where it does not fire) by function(v): everywhere or,
        as a node of a circuit, at one position of each row."""
        if not 0 <= latent < self.coder.cfg.width:
            raise ValueError(f"latent {latent}: this coder has latents 0 to {self.coder.cfg.width - 1}")
        self.edits.append((latent, function, position))

    def ablate(self, *latents: int, position: int | None = None) -> None:
        """Switch latents off."""
        for latent in latents:
            self.edit(latent, torch.zeros_like, position)

    def scale(self, latent: int, factor: float, position: int | None = None) -> None:
        """Multiply a latent's activation."""
        self.edit(latent, lambda v: factor * v, position)

    def add(self, latent: int, amount: float, position: int | None = None) -> None:
        """Add to a latent's activation, also where it does not fire: steering along its decoder direction."""
        self.edit(latent, lambda v: v + amount, position)

    def set(self, latent: int, value: float, position: int | None = None) -> None:
        """Hold a latent's activation at a value."""
        self.edit(latent, lambda v: torch.full_like(v, value), position)

    def clear(self) -> None:
        """Forget all edits."""
        self.edits.clear()

    def of(self, latent: int) -> Tensor:
        """[B, T] a latent's activation in the last forward pass, before edits."""
        return _activation(latent, self.values, self.indices)

    def attribution(self, scalar: Tensor) -> Tensor:
        """[B, T, K] each latent's share, to first order, in a scalar of the last forward pass (such as a logit):
        d scalar / d activation x activation, over all paths from this MLP on."""
        (gradient,) = torch.autograd.grad(scalar, self.y_hat, retain_graph=True)
        lead = self.values.shape[:2]
        directions = self.coder.W_dec[self.indices]
        return self.values.detach() * torch.einsum("bte,btke->btk", gradient.view(*lead, -1), directions)

    def _note(self, long_BT: Tensor) -> None:
        self.long_BT = long_BT

    def _run(self, x_ND: Tensor, position_BT: Tensor, changes_only: bool) -> Tensor:
        if x_ND.shape[1] != self.coder.d_in:
            raise ValueError(
                f"this coder reads {self.coder.d_in} dimensions, not {x_ND.shape[1]}; is it of another model?"
            )
        codes = self.coder.encode(x_ND)
        values_NK, indices_NK = codes.padded()
        shape = position_BT.shape
        self.values, self.indices = values_NK.view(*shape, -1), indices_NK.view(*shape, -1)
        edited: dict[int, Tensor] = {}
        for latent, function, position in self.edits:
            before_N = edited.get(latent, _activation(latent, values_NK, indices_NK))
            after_N = function(before_N)
            if position is not None:
                after_N = torch.where(position_BT.flatten() == position, after_N, before_N)
            edited[latent] = after_N
        # Adding an edit's change to the output is exact, as the decoder is linear, and works for silent latents.
        y_hat = x_ND.new_zeros(len(x_ND), self.coder.d_out) if changes_only else self.coder.decode(codes, x_ND)
        for latent, after_N in edited.items():
            change_N = after_N - _activation(latent, values_NK, indices_NK)
            y_hat = y_hat + change_N[:, None] * self.coder.W_dec[latent]
        self.y_hat = y_hat
        self.long_BT = torch.zeros(shape, dtype=torch.bool)
        if torch.is_grad_enabled() and not y_hat.requires_grad:
            y_hat.requires_grad_()
        return y_hat


def _activation(latent: int, values: Tensor, indices: Tensor) -> Tensor:
    return (values * (indices == latent)).sum(-1)


@contextmanager
def splice(
    model: nn.Module,
    coders: Mapping[str, SparseCoder],
    *,
    keep_error: bool = False,
    first_positions: int | None = None,
    special_tokens: Collection[int] | None = None,
) -> Iterator[dict[str, Spliced]]:
    """While active, replace the MLPs at the hookpoints in `coders` by these coders; works with generate().

    `keep_error`: keep the model's own output and add only what edits change. Positions that a coder was not trained on
    are not replaced: the first ones of each row (`first_positions`; None: as in its training) and `special_tokens`
    (token ids; None: the model's begin, end and padding tokens, if its training left special tokens out), and tokens
    longer than all that it was trained on (`stream.max_norm`). ValueError
    for a hookpoint that the model lacks and, when the model runs, for a coder of another width; a warning for a coder
    that was trained on another hookpoint.
    """
    spliced = {name: Spliced(coder) for name, coder in coders.items()}
    now = _Positions()
    with ExitStack() as stack:
        trunk = getattr(model, "base_model", model)
        stack.callback(trunk.register_forward_pre_hook(now.see, with_kwargs=True).remove)
        for name, one in spliced.items():
            hookpoint = name.removeprefix("" if trunk is model else f"{model.base_model_prefix}.")
            trained_on = one.coder.meta.get("hookpoint", hookpoint)
            if trained_on != hookpoint:
                warnings.warn(f"the coder for {name} was trained on {trained_on}", stacklevel=3)
            if "sides" in one.coder.meta:
                raise UserError(f"{one.coder!r} is of several sides at once and cannot be spliced into {name}")
            kept = one.coder.meta.get("data", {}).get("filter", {})
            first = first_positions if first_positions is not None else kept.get("first_positions", 0)
            special = special_tokens
            if special is None:
                special = _special(model) if kept.get("special_tokens") else ()
            stack.enter_context(
                replacing(
                    model,
                    *sites_of(hookpoint, one.coder),
                    lambda x, one=one: one._run(x.to(one.coder.W_dec), now.position_BT, keep_error),  # type: ignore[misc]
                    lambda first=first, special=special: now.excluded(first, special),  # type: ignore[misc]
                    adds=keep_error,
                    longest=one.coder.longest,
                    note=one._note,
                )
            )
        yield spliced


class _Positions:
    """Row positions of the tokens in the current forward pass: generate() hands the model one token at a time."""

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens of a forward pass as it begins."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        like = tokens if tokens is not None else kwargs["inputs_embeds"][..., 0]
        self.tokens_BT, (b, t) = tokens, like.shape
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if isinstance(mask, Tensor) and mask.ndim == 2:  # padding on the left does not count
            self.position_BT = (mask.long().cumsum(1) - 1)[:, -t:]
        else:
            past = int(cache.get_seq_length()) if cache is not None else 0
            self.position_BT = torch.arange(past, past + t, device=like.device).expand(b, t)

    def excluded(self, first: int, special: Collection[int]) -> Tensor:
        """bool [B, T]: positions not to replace."""
        keep = self.position_BT < first
        if special and self.tokens_BT is not None:
            keep = keep | torch.isin(self.tokens_BT, torch.tensor(sorted(special), device=keep.device))
        return keep


def _special(model: nn.Module) -> list[int]:
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(model.config, name, None)
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found)


def sites_of(name: str, coder: SparseCoder) -> tuple[Site, Site]:
    """Where a coder reads and writes: its own sites, if it was trained on this hookpoint; else the sides of the module
    of that name."""
    if coder.meta.get("hookpoint") == name:
        return Site(**coder.meta["read"]), Site(**coder.meta["write"])
    read = "output" if coder.cfg.kind == Kind.sae else "input"
    return Site(name, read), Site(name, "output")
