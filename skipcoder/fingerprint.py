"""Cheap fingerprints of files, so that a re-run can tell whether they changed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_WHOLE = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def of_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names relative to `root`, sizes and contents, in the order given.

    Files over 1 MiB are sampled (256 places of 4 KiB, including both ends): enough for weights, which
    training changes everywhere; a text file that changed only in unsampled bytes goes unnoticed.
    """
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                total.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                total.update(file.read(_SAMPLE_BYTES))
    return total.hexdigest()[:32]
