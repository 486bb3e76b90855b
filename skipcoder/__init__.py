"""Sparse coders for language models: capture once, train many, measure, explain."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the folders pipeline/, trainer/, ... stand beside this package, not inside it: an
# editable install and a plain PYTHONPATH then find them here. In a wheel they lie inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from skipcoder.evals.export import push_to_hub as push_to_hub
    from skipcoder.evals.splice import splice as splice
    from skipcoder.pipeline.store import ActivationStore as ActivationStore
    from skipcoder.trainer.coder import SparseCoder as SparseCoder
    from skipcoder.trainer.stream import ActivationStream as ActivationStream

_PUBLIC = {
    "ActivationStore": "skipcoder.pipeline.store",
    "ActivationStream": "skipcoder.trainer.stream",
    "SparseCoder": "skipcoder.trainer.coder",
    "push_to_hub": "skipcoder.evals.export",
    "splice": "skipcoder.evals.splice",
}
__all__ = ["ActivationStore", "ActivationStream", "SparseCoder", "push_to_hub", "splice"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command-line tools answer before torch is loaded.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'skipcoder' has no attribute {name!r}")
