"""Sparse coders for language models: capture once, train many, measure, explain."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipcoder.errors import UserError as UserError
    from skipcoder.evals.api import evaluate as evaluate
    from skipcoder.evals.export.export import push_to_hub as push_to_hub
    from skipcoder.evals.splice.splice import splice as splice
    from skipcoder.pipeline.api import capture as capture
    from skipcoder.pipeline.config import DataConfig as DataConfig
    from skipcoder.pipeline.config import ModelConfig as ModelConfig
    from skipcoder.pipeline.config import RayConfig as RayConfig
    from skipcoder.pipeline.config import StoreConfig as StoreConfig
    from skipcoder.pipeline.store.reader import ActivationStore as ActivationStore
    from skipcoder.trainer.api import train as train
    from skipcoder.trainer.api import train_set as train_set
    from skipcoder.trainer.coder.coder import SparseCoder as SparseCoder
    from skipcoder.trainer.coder.coder_set import SparseCoderSet as SparseCoderSet
    from skipcoder.trainer.config import CoderConfig as CoderConfig
    from skipcoder.trainer.config import LoopConfig as LoopConfig
    from skipcoder.trainer.config import LossConfig as LossConfig
    from skipcoder.trainer.config import OptimConfig as OptimConfig
    from skipcoder.trainer.config import StreamConfig as StreamConfig
    from skipcoder.trainer.data.stream import ActivationStream as ActivationStream

try:
    __version__ = version("skipcoder")  # from pyproject.toml
except PackageNotFoundError:  # a checkout on PYTHONPATH that was never installed
    __version__ = "0+unknown"

_PUBLIC = {
    "errors": ["UserError"],
    "evals.api": ["evaluate"],
    "evals.export.export": ["push_to_hub"],
    "evals.splice.splice": ["splice"],
    "pipeline.api": ["capture"],
    "pipeline.config": ["DataConfig", "ModelConfig", "RayConfig", "StoreConfig"],
    "pipeline.store.reader": ["ActivationStore"],
    "trainer.api": ["train", "train_set"],
    "trainer.coder.coder": ["SparseCoder"],
    "trainer.coder.coder_set": ["SparseCoderSet"],
    "trainer.config": ["CoderConfig", "LoopConfig", "LossConfig", "OptimConfig", "StreamConfig"],
    "trainer.data.stream": ["ActivationStream"],
}
_MODULES = {name: f"skipcoder.{module}" for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    # Lazy, so that the command-line tools answer before torch is loaded.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'skipcoder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
