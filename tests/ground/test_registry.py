"""Extensions are found through the environment and through entry points, also by Ray's workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skipcoder import registry
from skipcoder.errors import UserError
from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.registry import Registry
from tests.conftest import UNITS
from tests.pipeline.test_cache_cli import command

pytestmark = pytest.mark.slow


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry[int]:
    """A table that a module can reach as `registry.TEST`, before anything was loaded."""
    table: Registry[int] = Registry("some.key", {"one": 1})
    monkeypatch.setattr(registry, "TEST", table, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugins.cache_clear()
    return table


def test_a_module_of_the_environment(table: Registry[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_environment.py").write_text("from skipcoder import registry\nregistry.TEST['two'] = 2\n")
    monkeypatch.setenv("SKIPCODER_PLUGINS", "of_environment")
    assert table["one"] == 1 and "of_environment" not in sys.modules  # not before it is needed
    assert table["two"] == 2
    with pytest.raises(UserError, match=r"some\.key=three: choose from one, two; .* SKIPCODER_PLUGINS"):
        table["three"]
    registry.load_plugins.cache_clear()
    monkeypatch.setenv("SKIPCODER_PLUGINS", "not_there")
    with pytest.raises(UserError, match="SKIPCODER_PLUGINS: module not_there cannot be imported"):
        table["three"]


def test_an_entry_point_of_a_package(table: Registry[int], tmp_path: Path) -> None:
    (tmp_path / "of_package.py").write_text("from skipcoder import registry\nregistry.TEST['four'] = 4\n")
    info = tmp_path / "of_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: of_package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[skipcoder]\nanything = of_package\n")
    assert table["four"] == 4


@pytest.mark.ray
def test_workers_of_ray_find_them(tiny_model: Path, text_file: Path, tmp_path: Path, store: ActivationStore) -> None:
    (tmp_path / "of_workers.py").write_text(
        "from skipcoder.pipeline.store.codecs import CODECS, Bf16\nCODECS['mine'] = type('Mine', (Bf16,), {})\n"
    )
    run = command(tiny_model, text_file, tmp_path / "s.zarr", "store.codec=mine")
    environment = os.environ | {"SKIPCODER_PLUGINS": "of_workers", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(commit.committed_units(place_at(tmp_path / "s.zarr"))) == UNITS
