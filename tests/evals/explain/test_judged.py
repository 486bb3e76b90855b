"""What interpret.py found stands in the table and the report, while it is of these weights."""

import json
from pathlib import Path

import pytest

from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import Kind
from skipcoder.trainer.run.run import Run
from tests.evals.explain import made
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow


def test_interpretability_joins_the_table_and_the_report(store: ActivationStore, tmp_path: Path) -> None:
    for name, kind, score in (("a", Kind.sae, 0.6), ("b", Kind.transcoder, 0.7), ("c", Kind.skip_transcoder, 0.9)):
        training.train(config(store, kind), tmp_path / name)
        detection = {"balanced_accuracy": score, "balanced_accuracy_ci": [score - 0.05, score + 0.05]}
        weights = {} if name != "c" else {"weights": "others"}
        made.summary(Run.open(tmp_path / name), calibration={"usable": name == "a"}, detection=detection, **weights)
    out = tmp_path / "t.json"
    evaluate(EvaluateConfig(runs=f"{tmp_path}/[abc]", out=str(out), ce_tokens=128))
    rows = json.loads(out.read_text())
    assert [row.get("detection") for row in rows] == [0.6, 0.7, None]
    assert [row.get("judge_usable") for row in rows] == [True, False, None]
    page = (tmp_path / "report.html").read_text()
    assert "Interpretability: detection" in page and "did not pass its calibration" in page
    assert "Interpretability: fuzzing" not in page
