"""EleutherAI's sparsify (eai-sparsify 1.3): cfg.json and sae.safetensors.

It holds SAEs, transcoders and skip transcoders with top-k or group max that write as many dimensions as they read.
Transcoders from before February 2025 subtract b_dec from what they read, but their files do not say so:
`subtract_decoder_bias=True` reads them, and FVU on data tells the two sorts apart.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import MLP_KINDS, ActivationName, Kind
from skipcoder.trainer.formats.assemble import assemble, must_hold, need, read_json, read_tensors, refuse

MARK = "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}
_ACTIVATIONS = (ActivationName.topk, ActivationName.groupmax)


def write(coder: SparseCoder, folder: Path) -> None:
    """Write the same bits under sparsify's names."""
    cfg = coder.cfg
    must_hold(coder, "sparsify", MLP_KINDS, _ACTIVATIONS)
    if coder.d_in != coder.d_out:
        raise refuse(coder, "sparsify", f"it needs d_out = d_in, but these are {coder.d_out} and {coder.d_in}")
    tensors = coder.state_dict()
    config = {
        "activation": cfg.activation,
        "expansion_factor": 32,  # num_latents overrides it
        "normalize_decoder": cfg.normalize_decoder,
        "num_latents": cfg.width,
        "k": cfg.k,
        "multi_topk": False,
        "skip_connection": coder.W_skip is not None,
        "transcode": cfg.kind != Kind.sae,
        "d_in": coder.d_in,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensors[ours] for name, ours in _NAMES.items() if ours in tensors}, folder / MARK)
    (folder / "cfg.json").write_text(json.dumps(config, indent=2))


def read(folder: Path, *, subtract_decoder_bias: bool | None = None) -> SparseCoder:
    """Read a checkpoint of sparsify's own trainer, or of `write`. `subtract_decoder_bias`: whether a transcoder's
    encoder takes x - b_dec; None: it does not, as in all since February 2025."""
    config, tensors = read_json(folder / "cfg.json"), read_tensors(folder / MARK)
    need(tensors, tuple(_NAMES)[:4], folder / MARK)
    need(config, ("k",), folder / "cfg.json")
    is_transcoder = bool(config.get("transcode", False))
    if subtract_decoder_bias is not None and not is_transcoder:
        raise UserError(f"{folder}: subtract_decoder_bias is for transcoders; sparsify's SAEs always subtract b_dec")
    if config.get("signed"):
        raise UserError(f"{folder}: signed coders keep negative activations, ours do not")
    if (activation := config.get("activation", "topk")) not in _ACTIVATIONS:
        raise UserError(f"{folder}: activation {activation} cannot be read; can be: {', '.join(_ACTIVATIONS)}")
    kind = Kind.transcoder if is_transcoder else Kind.sae
    if config.get("skip_connection"):
        kind = Kind.skip_transcoder
    coder = assemble(
        kind,
        ActivationName(activation),
        config["k"],
        {ours: tensors[name] for name, ours in _NAMES.items() if name in tensors},
        subtracts_b_dec=bool(subtract_decoder_bias) if is_transcoder else True,
    )
    coder.cfg.normalize_decoder = config.get("normalize_decoder", True)
    coder.meta = {"imported": {"format": "sparsify", "config": config, "subtract_decoder_bias": subtract_decoder_bias}}
    return coder
