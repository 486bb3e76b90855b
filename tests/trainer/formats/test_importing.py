"""Imports onto stores other than the coder's own."""

from pathlib import Path
from typing import Any

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import Kind, RunConfig, StoreRef
from skipcoder.trainer.data.filter import USUAL
from skipcoder.trainer.formats import plain
from skipcoder.trainer.formats.config import ImportConfig
from skipcoder.trainer.formats.importing import import_coder
from skipcoder.trainer.run.provenance import attachment
from skipcoder.trainer.run.run import Run
from skipcoder.trainer.step.sides import Sides
from tests.trainer.coders import random_coder


def test_a_coder_of_ours_attaches_to_the_store_it_is_imported_on(
    store: ActivationStore, cache_config: Any, capture_here: Any, tmp_path: Path
) -> None:
    """What is not of the store stays."""
    coder = random_coder(Kind.transcoder)
    coder.meta = {**attachment(store, "layers.0.mlp", Sides("input", "output"), USUAL), "seed": 5}
    plain.write(coder, tmp_path / "coder")
    cfg = cache_config(tmp_path / "other.zarr")
    cfg.seed = 7
    other = capture_here(cfg)
    import_coder(
        ImportConfig(
            source=str(tmp_path / "coder"),
            store=StoreRef(str(other.path)),
            hookpoint="layers.1.mlp",
            run=RunConfig(str(tmp_path / "run")),
        )
    )
    again = Run.open(tmp_path / "run")
    again.check(other)
    assert again.coder.meta["hookpoint"] == "layers.1.mlp" and again.coder.meta["seed"] == 5
