"""Gemma Scope (arXiv 2408.05147): params.npz with a jumprelu SAE that does not subtract b_dec, or a transcoder.

The file does not say which it holds: pass `transcoder=True` for those of google/gemma-scope-2b-pt-transcoders.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import ActivationName, Kind
from skipcoder.trainer.formats.assemble import assemble, need

MARK = "params.npz"


def read(folder: Path, *, transcoder: bool = False) -> SparseCoder:
    """Read the coder of one folder, e.g. layer_12/width_16k/average_l0_82."""
    file = folder / MARK
    try:
        with np.load(file) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    need(tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), file)
    if "scaling_factor" in tensors and not (tensors["scaling_factor"] == 1).all():
        raise UserError(f"{file} holds a scaling_factor other than 1, which we do not read")
    names = ("b_enc", "W_dec", "b_dec", "threshold")
    ours = {name: tensors[name] for name in names} | {"W_enc": tensors["W_enc"].T}
    kind = Kind.transcoder if transcoder else Kind.sae
    coder = assemble(kind, ActivationName.jumprelu, 32, ours, subtracts_b_dec=False)
    coder.meta = {"imported": {"format": "gemma_scope", "transcoder": transcoder}}
    return coder
