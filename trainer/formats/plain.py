"""Our own files: coder.safetensors and coder.json (docs/formats.md), which hold every coder."""

from pathlib import Path

from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.files import TENSORS

MARK = f"{TENSORS}*"
"""Also the index of a coder in several files."""


def write(coder: SparseCoder, folder: Path) -> None:
    """Write any coder, with all that is known about it."""
    coder.save(folder)


def read(folder: Path) -> SparseCoder:
    """Read what `write` wrote."""
    return SparseCoder.load(folder)
