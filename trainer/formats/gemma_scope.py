"""Gemma Scope: jumprelu SAEs that do not subtract b_dec, and transcoders.

The first (arXiv 2408.05147) has params.npz, which does not say which it holds: pass `transcoder=True` for those of
google/gemma-scope-2b-pt-transcoders. The second (google/gemma-scope-2-*) has params.safetensors and config.json, and
transcoders that may have an affine skip; this was written from a description of its files, none of which could be read
here.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import ActivationName, Kind
from skipcoder.trainer.formats.assemble import assemble, need, read_json, read_tensors

MARK = "params.*"
FIRST, SECOND, SKIP = "params.npz", "params.safetensors", "affine_skip_connection"


def read(folder: Path, *, transcoder: bool | None = None) -> SparseCoder:
    """Read the coder of one folder, e.g. layer_12/width_16k/average_l0_82. `transcoder`: for params.npz."""
    if (folder / SECOND).exists():
        return _second(folder)
    file = folder / FIRST
    try:
        with np.load(file) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if "scaling_factor" in tensors and not (tensors["scaling_factor"] == 1).all():
        raise UserError(f"{file} holds a scaling_factor other than 1, which we do not read")
    coder = _assembled(tensors, file, Kind.transcoder if transcoder else Kind.sae, 32)
    coder.meta = {"imported": {"format": "gemma_scope", "transcoder": bool(transcoder)}}
    return coder


def _second(folder: Path) -> SparseCoder:
    config, file = read_json(folder / "config.json"), folder / SECOND
    if config.get("architecture") != "jump_relu":
        raise UserError(f"{folder / 'config.json'}: architecture={config.get('architecture')}: only jump_relu is read")
    tensors = {name.replace("w_", "W_"): tensor for name, tensor in read_tensors(file).items()}
    if tensors.get("W_dec", torch.zeros(1, 1)).ndim != 2:
        raise UserError(f"{file}: w_dec has {tensors['W_dec'].ndim} dimensions; cross-layer transcoders are not read")
    place = config.get("hf_hook_point_in")
    kind = Kind.sae if config.get("hf_hook_point_out", place) == place else Kind.transcoder
    coder = _assembled(tensors, file, Kind.skip_transcoder if SKIP in tensors else kind, int(config.get("l0") or 32))
    coder.meta = {"imported": {"format": "gemma_scope", "config": config}}
    return coder


def _assembled(tensors: dict[str, Tensor], file: Path, kind: Kind, k: int) -> SparseCoder:
    need(tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), file)
    ours = {name: tensors[name] for name in ("b_enc", "W_dec", "b_dec", "threshold")} | {"W_enc": tensors["W_enc"].T}
    if SKIP in tensors:
        ours["W_skip"] = tensors[SKIP].T
    return assemble(kind, ActivationName.jumprelu, k, ours, subtracts_b_dec=False)
