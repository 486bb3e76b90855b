"""SAELens (6.x): cfg.json and sae_weights.safetensors, with W_enc transposed.

It holds SAEs with top-k, and every kind of coder with thresholds (jumprelu, batchtopk). It has no class for transcoders
with top-k; they need the classes that `skipcoder.trainer.formats.saelens_classes` registers when it is imported, or
thresholds in place of top-k (coder/convert.py).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import MLP_KINDS, ActivationName, Kind
from skipcoder.trainer.formats.assemble import assemble, must_hold, need, read_json, read_tensors
from skipcoder.trainer.formats.hooks import transformer_lens

MARK = "sae_weights.safetensors"
VERSION = "6.54.12"
"""The version that the tests ran with; SAELens takes files without one for old files and drops their hooks."""
_KINDS = {"": Kind.sae, "transcoder": Kind.transcoder, "skip_transcoder": Kind.skip_transcoder}
_ACTIVATIONS = {"standard": ActivationName.jumprelu, "topk": ActivationName.topk, "jumprelu": ActivationName.jumprelu}


def architecture(coder: SparseCoder) -> str:
    """Return SAELens' name for a coder (for top-k transcoders, ours); raise UserError if there is none."""
    activation, kind = coder.cfg.activation, coder.cfg.kind
    must_hold(coder, "saelens", MLP_KINDS, (ActivationName.topk, ActivationName.batchtopk, ActivationName.jumprelu))
    name = "topk" if activation == ActivationName.topk else "jumprelu"
    return name if kind == Kind.sae else f"{name}_{kind}"


def write(coder: SparseCoder, folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Write the same bits, with W_enc transposed. `facts` are added to the metadata."""
    is_sae = coder.cfg.kind == Kind.sae
    config = {
        "architecture": architecture(coder), "d_in": coder.d_in, "d_sae": coder.cfg.width,
        **({} if is_sae else {"d_out": coder.d_out}),
        **({"k": coder.cfg.k, "rescale_acts_by_decoder_norm": False} if coder.threshold is None else {}),
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": is_sae, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": _metadata(coder) | (facts or {}),
    }  # fmt: skip
    tensors = coder.state_dict()
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / MARK)
    (folder / "cfg.json").write_text(json.dumps(config, indent=2))


def _metadata(coder: SparseCoder) -> dict[str, Any]:
    meta = coder.meta
    found = {
        "sae_lens_version": VERSION, "sae_lens_training_version": None, "trained_by": "skipcoder",
        "neuronpedia_id": None, "hook_head_index": None, "seqpos_slice": [None],
    }  # fmt: skip
    if "read" in meta:
        found |= {
            "model_name": meta["model"]["id"],
            "hook_name": transformer_lens(meta["read"]),
            "hook_name_out": transformer_lens(meta["write"]),
            "hf_hook_name": meta["read"]["module"],
            "hf_hook_name_out": meta["write"]["module"],
            "context_size": meta["data"]["source"]["context"],
            "dataset_path": meta["data"]["source"]["path"],
            "prepend_bos": None,
        }
    return found


def read(folder: Path) -> SparseCoder:
    """Read an SAE or transcoder written by SAELens' `SAE.save_model` (or `save_inference_model`), or by `write`."""
    config, tensors = read_json(folder / "cfg.json"), read_tensors(folder / MARK)
    need(tensors, ("W_enc", "b_enc", "W_dec", "b_dec"), folder / MARK)
    name = config.get("architecture", "standard")
    kind, activation = _parse(name, folder)
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key) not in (None, "none", False):
            raise UserError(f"{folder}: {key}={config[key]} cannot be folded into weights; fold it with SAELens first")
    if config.get("activation_fn", "relu") not in ("relu", "topk"):
        raise UserError(f"{folder}: activation_fn={config['activation_fn']}: ours are ReLU with a choice of latents")
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")
    ours = {name: tensors[name] for name in names if name in tensors} | {"W_enc": tensors["W_enc"].T}
    if config.get("rescale_acts_by_decoder_norm"):
        norm_M1 = ours["W_dec"].norm(dim=1, keepdim=True)
        ours["W_enc"], ours["W_dec"] = ours["W_enc"] * norm_M1, ours["W_dec"] / norm_M1
        ours["b_enc"] = ours["b_enc"] * norm_M1[:, 0]
    if activation == ActivationName.jumprelu and "threshold" not in ours:  # ReLU: everything above 0
        ours["threshold"] = torch.zeros_like(ours["b_enc"])
    k = config.get("k", 100 if activation == ActivationName.topk else 32)
    subtracts_b_dec = kind == Kind.sae and bool(config.get("apply_b_dec_to_input", True))
    coder = assemble(kind, activation, int(k), ours, subtracts_b_dec)
    coder.meta = {"imported": {"format": "saelens", "config": config}}
    return coder


def _parse(name: str, folder: Path) -> tuple[Kind, ActivationName]:
    """Parse a name: `jumprelu_skip_transcoder` -> (skip_transcoder, jumprelu)."""
    if name in ("transcoder", "skip_transcoder"):
        return _KINDS[name], ActivationName.jumprelu  # SAELens' own are ReLU, whatever their files say
    first, _, rest = name.partition("_")
    if first not in _ACTIVATIONS or rest not in _KINDS:
        known = ["standard", "topk", "jumprelu", "transcoder", "skip_transcoder"]
        raise UserError(f"{folder}: architecture {name} cannot be read; can be: {', '.join(known)} and combinations")
    return _KINDS[rest], _ACTIVATIONS[first]
