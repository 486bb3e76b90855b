"""`skipcoder.capture`: pipeline/cache.py from Python."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from skipcoder.cli import CONF
from skipcoder.errors import UserError
from skipcoder.pipeline import cache
from skipcoder.pipeline.config import CacheConfig, DataConfig, Dtype, ModelConfig, StoreConfig
from skipcoder.pipeline.store.reader import ActivationStore


def capture(
    store: str | Path | StoreConfig,
    model: str | Path | ModelConfig = "smollm2-135m",
    hookpoints: Sequence[str] | None = None,
    data: DataConfig | None = None,
    **settings: Any,
) -> ActivationStore:
    """Capture MLP inputs and outputs into a store, or finish or extend the one that is there; return it.

    model       a preset's name (conf/model), a hub id, a folder, or a ModelConfig
    hookpoints  names of modules, globs allowed; None: the preset's
    data        text and number of tokens; None: 131,072 tokens of Python's standard library
    settings    the other fields of CacheConfig: ray, micro_batch_tokens, seed

    UserError for bad input, as on the command line.
    """
    config = CacheConfig(
        model=model if isinstance(model, ModelConfig) else model_named(str(model)),
        hookpoints=["?"],
        store=store if isinstance(store, StoreConfig) else StoreConfig(path=str(store)),
        data=data or DataConfig(),
    )
    if wrong := settings.keys() - {field.name for field in fields(CacheConfig)}:
        raise UserError(f"{', '.join(sorted(wrong))}: no setting of a capture; there are {_names(CacheConfig)}")
    config = replace(config, hookpoints=list(config.model.hookpoints if hookpoints is None else hookpoints), **settings)
    cache.capture(config)
    return ActivationStore.open(config.store.path)


def model_named(name: str) -> ModelConfig:
    """The model of a preset, a hub id or a folder. UserError where it is none of them."""
    preset = Path(CONF, "model", f"{name}.yaml")
    if preset.is_file() and name != "local":
        found: dict[str, Any] = yaml.safe_load(preset.read_text())
        return ModelConfig(**found | ({"dtype": Dtype(found["dtype"])} if "dtype" in found else {}))
    if "/" not in name and not Path(name).is_dir():
        known = sorted(path.stem for path in preset.parent.glob("*.yaml") if path.stem != "local")
        raise UserError(f"model {name!r}: no preset ({', '.join(known)}), no folder, and no hub id (ORG/NAME)")
    return ModelConfig(name="local", id=name)


def _names(schema: type) -> str:
    return ", ".join(field.name for field in fields(schema))
