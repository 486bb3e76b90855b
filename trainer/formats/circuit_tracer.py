"""circuit-tracer (0.4): one folder for all layers of a model, with config.yaml, layer_0.safetensors, layer_1...

It holds transcoders and skip transcoders of one width: with top-k, if at least k latents are above zero on every token
(it keeps what top-k chooses even if negative, where ours gives zero), or with thresholds of at least 0 (jumprelu,
batchtopk). When `ReplacementModel.from_pretrained` loads a local folder, it ignores top-k and takes all positive
latents; config.yaml says how to load one with top-k. When it loads from the Hub, it keeps top-k.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import ActivationName, Kind
from skipcoder.trainer.formats.assemble import assemble, must_hold, need, read_tensors, refuse
from skipcoder.trainer.formats.hooks import layer_of, transformer_lens

MARK = "layer_*.safetensors"
_ACTIVATIONS = (ActivationName.topk, ActivationName.batchtopk, ActivationName.jumprelu)
_THRESHOLD = "activation_function.threshold"
_LOCAL = """\
# Of a folder on this machine, circuit-tracer's ReplacementModel.from_pretrained ignores `activation`. Load it by:
#   config = yaml.safe_load(open("config.yaml")) | {"transcoders": [absolute paths of layer_0.safetensors, ...]}
#   load_transcoders(config | {"repo_id": "", "scan": "NAME"}, ...)
#   ReplacementModel.from_pretrained_and_transcoders(...)
"""


def write(coders: Sequence[SparseCoder], folder: Path) -> None:
    """Write one transcoder for each layer from 0 on; `coders` can be in any order."""
    for coder in coders:
        must_hold(coder, "circuit_tracer", (Kind.transcoder, Kind.skip_transcoder), _ACTIVATIONS)
        if coder.d_in != coder.d_out:
            raise refuse(coder, "circuit_tracer", f"it needs d_out = d_in, not {coder.d_out} and {coder.d_in}")
        if coder.threshold is not None and coder.threshold.min() < 0:
            raise refuse(coder, "circuit_tracer", "a threshold is below 0, and there is no ReLU beside it there")
    by_layer = {layer_of(coder.meta["write"]["module"]): coder for coder in coders}
    if sorted(by_layer) != list(range(len(coders))):
        raise UserError(
            f"circuit_tracer needs exactly one transcoder for each layer from 0 on, not of layers "
            f"{sorted(layer_of(coder.meta['write']['module']) for coder in coders)}; choose them with runs=GLOB"
        )
    described = {
        (c.cfg.width, c.cfg.activation, c.cfg.k if c.threshold is None else 0, c.d_in, c.W_skip is None) for c in coders
    }
    if len(described) > 1:
        raise UserError("circuit_tracer needs equal kind, width, activation and k in all layers")
    first = by_layer[0]
    hooks = {which: {transformer_lens(c.meta[which]).split(".", 2)[-1] for c in coders} for which in ("read", "write")}
    if any(len(names) > 1 for names in hooks.values()):
        raise UserError(f"circuit_tracer needs one kind of place to read and one to write in all layers, not {hooks}")
    config = {
        "model_name": first.meta["model"]["id"],
        "model_kind": "transcoder_set",
        "feature_input_hook": hooks["read"].pop(),
        "feature_output_hook": hooks["write"].pop(),
        **({"activation": "topk", "k": first.cfg.k} if first.threshold is None else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for layer, coder in by_layer.items():
        tensors = coder.state_dict()
        if coder.threshold is not None:
            tensors[_THRESHOLD] = tensors.pop("threshold")
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(_LOCAL + yaml.safe_dump(config, sort_keys=False))


def read(folder: Path, *, layer: int) -> SparseCoder:
    """Read the transcoder of one layer. Values below zero that its top-k chooses count as zero."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be read: {error}") from None
    model_kind = config.get("model_kind") if isinstance(config, dict) else None
    if model_kind != "transcoder_set":
        raise UserError(f"{folder / 'config.yaml'}: model_kind={model_kind}: only transcoder_set can be read")
    file = folder / f"layer_{layer}.safetensors"
    tensors = read_tensors(file)
    need(tensors, ("W_enc", "b_enc", "W_dec", "b_dec"), file)
    threshold = tensors.pop(_THRESHOLD, torch.zeros_like(tensors["b_enc"]))
    activation = ActivationName.topk if config.get("activation") == "topk" else ActivationName.jumprelu
    if activation == ActivationName.jumprelu:
        tensors["threshold"] = torch.zeros_like(threshold) if config.get("activation") == "relu" else threshold
    kind = Kind.skip_transcoder if "W_skip" in tensors else Kind.transcoder
    coder = assemble(kind, activation, int(config.get("k", 32)), tensors)
    coder.meta = {"imported": {"format": "circuit_tracer", "config": config, "layer": layer}}
    return coder
