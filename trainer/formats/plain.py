"""Our own files: coder.safetensors and coder.json (docs/formats.md), which hold every coder."""

from pathlib import Path

from skipcoder.trainer.checkpoint import TENSORS, load_coder, save_coder
from skipcoder.trainer.coder import SparseCoder

MARK = TENSORS


def write(coder: SparseCoder, folder: Path) -> None:
    """Any coder, with all that is known of it."""
    save_coder(coder, folder)


def read(folder: Path) -> SparseCoder:
    """What `write` wrote."""
    return load_coder(folder)
