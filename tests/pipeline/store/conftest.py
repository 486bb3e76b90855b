"""A store to change or damage."""

import shutil
from pathlib import Path

import pytest

from skipcoder.pipeline.store.reader import ActivationStore


@pytest.fixture
def copy(store: ActivationStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.path, tmp_path / "copy.zarr"))
