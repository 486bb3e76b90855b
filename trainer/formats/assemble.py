"""Turn tensors and files into coders and back, for all formats. Legend: M latents."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind


@torch.no_grad()
def assemble(
    kind: Kind, activation: ActivationName, k: int, tensors: Mapping[str, Tensor], subtracts_b_dec: bool | None = None
) -> SparseCoder:
    """Make a coder of tensors named and shaped as SparseCoder's. `subtracts_b_dec`: whether they were made for an
    encoder that takes x - b_dec; ours does so for SAEs but not transcoders, and a difference is folded into b_enc.
    None: the same as ours."""
    (m, d_in), d_out = tensors["W_enc"].shape, len(tensors["b_dec"])
    if kind == Kind.sae and d_in != d_out:
        raise UserError(f"an SAE reconstructs what it reads, but these weights lead from {d_in} to {d_out} dimensions")
    coder = SparseCoder(CoderConfig(kind=kind, activation=activation, k=min(k, m), width=m), d_in, d_out)
    expected = {name: tuple(tensor.shape) for name, tensor in coder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise UserError(f"a {kind} must have tensors of shapes {expected}, not {found}")
    coder.load_state_dict({name: tensor.float().contiguous() for name, tensor in tensors.items()})
    ours = kind == Kind.sae
    if subtracts_b_dec not in (None, ours):
        shift_M = coder.W_enc.double() @ coder.b_dec.double()
        coder.b_enc.add_(shift_M.float(), alpha=1 if ours else -1)
    return coder


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raise UserError if the file holds none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object")
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def need(tensors: dict[str, Any], names: tuple[str, ...], file: Path) -> None:
    """Raise UserError unless `tensors` has all `names`."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors))}")


def must_hold(coder: SparseCoder, format: str, kinds: Collection[str], activations: Collection[str]) -> None:
    """Raise UserError unless the format can hold this coder's kind and activation."""
    for what, found, known in (("kind", coder.cfg.kind, kinds), ("activation", coder.cfg.activation, activations)):
        if found not in known:
            raise refuse(coder, format, f"its {what} can be {', '.join(known)}")


def refuse(coder: SparseCoder, format: str, reason: str) -> UserError:
    """Return the error for a coder that a format cannot hold."""
    return UserError(f"{format} cannot hold this {coder.cfg.kind} ({coder.cfg.activation}): {reason}")
