"""Runs to export."""

from pathlib import Path
from typing import Any

import pytest

from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.export import export as exporting
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank
from skipcoder.trainer.config import MLP_KINDS, Kind
from skipcoder.trainer.formats.config import ExportConfig, Target
from tests.trainer.run.test_run import config


@pytest.fixture(scope="module")
def runs(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """An SAE, a transcoder and a skip transcoder of layer 1, and skip transcoders of layers 0 and 2."""
    folder = tmp_path_factory.mktemp("runs")
    found: dict[Any, Path] = {}
    for kind in MLP_KINDS:
        bank.train(config(store, kind), found.setdefault(kind, folder / kind.value))
    for layer in (0, 2):
        cfg = config(store)
        cfg.hookpoint = f"layers.{layer}.mlp"
        bank.train(cfg, found.setdefault(layer, folder / f"layer{layer}"))
    evaluate(EvaluateConfig(run=str(found[Kind.skip_transcoder]), intervals=False, ce_tokens=64))
    return found


def export(runs: list[Path], format: Target, out: Path, **options: Any) -> Path:
    which: dict[str, Any] = {"run": str(runs[0])} if len(runs) == 1 else {"runs": "GLOB"}
    return exporting.export(ExportConfig(**which, format=format, out=str(out), **options), runs)
