"""Sparse coders for language models: capture once, train many, measure, explain."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipcoder.evals.export.export import push_to_hub as push_to_hub
    from skipcoder.evals.splice.splice import splice as splice
    from skipcoder.pipeline.store.reader import ActivationStore as ActivationStore
    from skipcoder.trainer.coder.coder import SparseCoder as SparseCoder
    from skipcoder.trainer.data.stream import ActivationStream as ActivationStream

try:
    __version__ = version("skipcoder")  # from pyproject.toml
except PackageNotFoundError:  # a checkout on PYTHONPATH that was never installed
    __version__ = "0+unknown"

_PUBLIC = {
    "ActivationStore": "skipcoder.pipeline.store.reader",
    "ActivationStream": "skipcoder.trainer.data.stream",
    "SparseCoder": "skipcoder.trainer.coder.coder",
    "push_to_hub": "skipcoder.evals.export.export",
    "splice": "skipcoder.evals.splice.splice",
}
__all__ = ["ActivationStore", "ActivationStream", "SparseCoder", "push_to_hub", "splice"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command-line tools answer before torch is loaded.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'skipcoder' has no attribute {name!r}")
