"""`skipcoder.capture`: pipeline/cache.py from Python."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from skipcoder.cli import CONF
from skipcoder.errors import UserError
from skipcoder.pipeline import cache
from skipcoder.pipeline.config import CacheConfig, DataConfig, Dtype, ModelConfig, SourceKind, StoreConfig
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.settings import as_typed, refuse_unknown


def capture(
    store: str | Path | StoreConfig,
    model: str | Path | ModelConfig = "smollm2-135m",
    hookpoints: str | Sequence[str] | None = None,
    data: DataConfig | None = None,
    **settings: Any,
) -> ActivationStore:
    """Capture MLP inputs and outputs into a store, or finish or extend the one that is there; return it.

    model       a preset's name (conf/model), a hub id, a folder, or a ModelConfig
    hookpoints  names of modules, globs allowed; None: the preset's
    data        text and number of tokens; None: 131,072 tokens of Python's standard library. Of its long files one row
                each is held out, as on the command line, unless held_out_rows says otherwise
    settings    the other fields of CacheConfig: ray, micro_batch_tokens, seed

    UserError for bad input, as on the command line.
    """
    refuse_unknown("a capture", settings, CacheConfig, "model", "hookpoints", "store", "data", "plan")
    data = data or DataConfig()
    if data.kind == SourceKind.stdlib and data.held_out_rows is None:
        data = replace(data, held_out_rows=1)
    config = CacheConfig(
        model=model if isinstance(model, ModelConfig) else model_named(str(model)),
        hookpoints=["?"],
        store=store if isinstance(store, StoreConfig) else StoreConfig(path=str(store)),
        data=data,
    )
    chosen = [hookpoints] if isinstance(hookpoints, str) else hookpoints
    config = replace(config, hookpoints=list(config.model.hookpoints if chosen is None else chosen), **settings)
    config = as_typed(config)
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
