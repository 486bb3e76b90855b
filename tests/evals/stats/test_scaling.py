"""evals/scaling.py on trained and evaluated runs of the tiny model."""

import json
from itertools import product
from pathlib import Path

import pytest

from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig, ScalingConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.scaling import operations, scaling
from skipcoder.evals.stats.law import Size, law_of
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank
from skipcoder.trainer.config import CoderConfig, Kind
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 evaluated transcoders in `fit`, a larger one in `larger`, one that was not evaluated in `bare`."""
    directory = tmp_path_factory.mktemp("scaling")
    sizes = [("fit", *size) for size in product((2, 4, 8), (16, 32, 64), (10, 20, 40))]
    jobs = []
    for place, (folder, k, width, steps) in enumerate([*sizes, ("larger", 4, 128, 80), ("bare", 4, 32, 10)]):
        cfg = config(store, Kind.transcoder, tokens=128 * steps, eval_tokens=0)
        cfg.coder = CoderConfig(kind=Kind.transcoder, k=k, width=width)
        jobs.append((cfg, directory / folder / str(place)))
    bank.train_bank(jobs)
    for folder in ("larger", "fit"):
        evaluate(EvaluateConfig(runs=f"{directory}/{folder}/*", out=f"{directory}/{folder}.json", ce_tokens=32))
    return directory


def test_laws_and_predictions(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling(
        ScalingConfig(
            runs=f"{runs}/fit/*", against=f"{runs}/larger/*",
            predict="k=4 width=32 tokens=2560, k=8 width=256 tokens=1e6",
            compute=1e8, memory_gib=1, out=str(tmp_path / "law.json"),
        )
    )  # fmt: skip
    told = json.loads((tmp_path / "law.json").read_text())[0]
    assert (tmp_path / "law.svg").read_text().count("<svg") == 1
    rows = json.loads((runs / "fit.json").read_text())
    law = law_of(rows, "fvu")
    assert told["metric"] == "fvu" and told["runs"] == 27 and told["formula"] == law.formula
    larger, within, beyond, *best = told["predictions"]
    (measured,) = json.loads((runs / "larger.json").read_text())
    assert larger["measured"] == measured["fvu"] and larger["run"] == measured["run"]
    assert larger["ci"][0] < measured["fvu"] < larger["ci"][1]
    assert within["value"] == law.predict(Size(4, 32, 2560)).value and within["beyond"] == {}
    assert beyond["beyond"] == {"width": 4.0, "tokens": 1e6 / max(row["train_tokens"] for row in rows)}
    assert [one["k"] for one in best] == [2, 4, 8]
    for one in best:
        assert one["operations"] <= 1e8 * 1.001 and one["memory_gib"] < 1
        assert one["operations"] == pytest.approx(
            operations("transcoder", one["k"], one["width"], 24, 24) * one["tokens"]
        )
        for width in (max(16, one["width"] // 2), 2 * one["width"]):
            tokens = 1e8 / operations("transcoder", one["k"], width, 24, 24)
            assert law.predict(Size(one["k"], width, tokens)).value >= one["value"] - 1e-9
    printed = capsys.readouterr().out
    assert printed.count("EXTRAPOLATED") >= 2 and "fitted without them" in printed


def test_the_report_draws_the_law(runs: Path) -> None:
    """That of the runs in `fit`, which were evaluated last."""
    page = (runs / "report.html").read_text()
    assert "FVU by size: layers.1.mlp transcoder" in page
    assert law_of(json.loads((runs / "fit.json").read_text()), "fvu").formula in page


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"runs": "bare/*"}, "has not been evaluated"),
        ({"runs": "larger/*"}, "takes 20"),
        ({"runs": "none/*"}, "matches no run directory"),
        ({"predict": "k=4 width=32"}, "write predict='k=64 width=65536 tokens=1e9'"),
        ({"predict": "k=64 width=32 tokens=1e6"}, "k at most the width"),
        ({"memory_gib": 0.1}, "no coder of k=2 fits"),
    ],
)
def test_bad_input_is_named(runs: Path, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scaling(ScalingConfig(**{**asked, "runs": f"{runs}/{asked.get('runs', 'fit/*')}"}))
