"""What a sweep's evaluation writes beside its table: seeds, controls, layers together, SAEBench's form."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput
from sae_bench.evals.core.eval_output import CoreEvalOutput
from sae_bench.evals.ravel.eval_output import RAVELEvalOutput
from sae_bench.evals.scr_and_tpp.eval_output import ScrEvalOutput, TppEvalOutput
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput

from skipcoder.errors import UserError
from skipcoder.evals.config import Control, EvaluateConfig, TaskName
from skipcoder.evals.core import evaluator
from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.evals.core.results import record
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.tables import saebench
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import Kind
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow

LAYERS = ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp")
CLASSES: dict[str, Any] = {
    "core": CoreEvalOutput, "absorption": AbsorptionEvalOutput, "sparse_probing": SparseProbingEvalOutput,
    "scr": ScrEvalOutput, "tpp": TppEvalOutput, "ravel": RAVELEvalOutput,
}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a transcoder on each of three layers, and an SAE."""
    directory = tmp_path_factory.mktemp("sweep")
    for number, (layer, seed) in enumerate((layer, seed) for layer in LAYERS for seed in (0, 1)):
        training.train(replace(config(store, Kind.transcoder), hookpoint=layer, seed=seed), directory / str(number))
    training.train(config(store, Kind.sae), directory / "6")
    return directory


@pytest.fixture(scope="module")
def table(sweep: Path) -> Path:
    out = sweep / "out" / "table.json"
    evaluate(
        EvaluateConfig(
            runs=f"{sweep}/[0-5]", out=str(out), ce_tokens=128, together=True, controls=list(Control),
            saebench=str(sweep / "saebench"),
            every_position=True,
        )
    )  # fmt: skip
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def test_seeds_are_put_together(table: Path) -> None:
    seeds = [row for row in read(table.with_suffix(".seeds.json")) if row["kind"] == "transcoder"]
    assert [(row["hookpoint"], row["seeds"]) for row in seeds] == [(layer, 2) for layer in LAYERS]
    rows = read(table)
    assert seeds[0]["fvu"] == pytest.approx((rows[0]["fvu"] + rows[1]["fvu"]) / 2)
    assert seeds[0]["fvu_ci"][0] < seeds[0]["fvu"] < seeds[0]["fvu_ci"][1]
    assert all(0 <= row["shared_latents"] <= 1 for row in seeds)
    page = (table.parent / "report.html").read_text()
    assert "Over seeds" in page and "shared by seeds" in page


def test_intervals_and_differences_are_of_documents(
    cache_config: Any, capture_here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one row of each held-out document. The best coder is marked where every difference is clear."""
    cfg = cache_config(tmp_path / "s.zarr", rows=400, unit_rows=1)
    cfg.data.held_out_rows = 1
    store = capture_here(cfg)
    for name, kind in (("a", Kind.transcoder), ("b", Kind.skip_transcoder)):
        training.train(config(store, kind), tmp_path / name)
    evaluate(EvaluateConfig(runs=f"{tmp_path}/[ab]", out=str(tmp_path / "t.json"), ce_tokens=24 * 16))
    assert "no interval" not in capsys.readouterr().out
    documents = len({int(d) for unit in store.split("test") for d in store.documents(unit).flat})
    one, two = read(tmp_path / "t.json")
    for row in (one, two):
        assert documents >= row["documents"] > 20 and row["ce_documents"] > 20
        for key in ("fvu", "ce_increase", "kl_spliced"):
            low, high = row[f"{key}_ci"]
            assert low < row[key] < high
    pairs = read(tmp_path / "t.pairs.json")
    assert {pair["metric"] for pair in pairs} == {"fvu", "ce_increase", "kl_spliced"}
    fvu = next(pair for pair in pairs if pair["metric"] == "fvu")
    assert (fvu["run"], fvu["best"]) == (one["run"], two["run"])
    assert fvu["difference"] == pytest.approx(one["fvu"] - two["fvu"])
    low, high = fvu["difference_ci"]
    own = [row["fvu_ci"][1] - row["fvu_ci"][0] for row in (one, two)]
    assert 0 < low < fvu["difference"] < high and high - low < max(own)
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="best"') == sum(pair["difference_ci"][0] > 0 for pair in pairs)
    assert "\u00b1" in page and "There is no interval" not in page
    evaluate(EvaluateConfig(runs=f"{tmp_path}/[ab]", out=str(tmp_path / "u.json"), ce_tokens=64, intervals=False))
    assert not [key for row in read(tmp_path / "u.json") for key in row if key.endswith("_ci") and row[key]]
    assert not (tmp_path / "u.pairs.json").exists()


def test_what_keeps_intervals_away_is_said(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(EvaluateConfig(runs=f"{sweep}/[0-1]", out=str(sweep / "few" / "t.json"), ce_tokens=128))
    said, page = capsys.readouterr().out, (sweep / "few" / "report.html").read_text()
    assert "no interval for FVU" in said and "fewer than 20 of equal size" in said and "larger ce_tokens" in said
    assert "There is no interval for FVU" in page and 'class="best"' not in page


def test_time_that_a_bank_s_coders_share_is_counted_once(tmp_path: Path, store: ActivationStore) -> None:
    jobs = [(config(store, kind), tmp_path / kind.value) for kind in (Kind.sae, Kind.transcoder)]
    outcomes = training.train_bank(jobs)
    seconds = [outcome.summary["seconds"] or 0 for outcome in outcomes if outcome.summary]
    assert len(seconds) == 2 and all(o.summary and o.summary["bank_coders"] == 2 for o in outcomes)
    for summary in tmp_path.glob("*/summary.json"):  # long enough to be told apart in whole seconds
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"seconds": 500.0}))
    evaluate(EvaluateConfig(runs=f"{tmp_path}/*", out=str(tmp_path / "t.json"), ce_tokens=64))
    assert "<dd>500 s for 2 coders</dd>" in (tmp_path / "report.html").read_text()


def test_controls_are_rows(table: Path) -> None:
    rows = {(row["kind"], row["hookpoint"]): row for row in read(table)}
    for layer in LAYERS:
        neurons, affine = rows["neurons", layer], rows["affine", layer]
        assert neurons["k"] == 4 and neurons["width"] == 48 and neurons["l0"] == 4
        assert affine["l0"] == 0 and affine["dead_fraction"] == 1
        assert 0 < affine["fvu"] < 1 and affine["ce_clean"] == rows["transcoder", layer]["ce_clean"]
    assert len(rows) == 9


@torch.no_grad()
def test_layers_together_are_plain_hooks_on_all_of_them(table: Path, sweep: Path, store: ActivationStore) -> None:
    rows = read(table.with_suffix(".together.json"))
    assert [row["hookpoints"] for row in rows] == [list(LAYERS)] * 2
    evaluator = Evaluator(store, 128, 4, "cpu")
    trunk: Any = evaluator.model.base_model
    handles = []
    for layer, number in zip(LAYERS, (1, 3, 5), strict=True):  # the second seed's
        coder = Run.open(sweep / str(number)).coder
        handles.append(
            trunk.get_submodule(layer).register_forward_hook(
                lambda _, args, out, coder=coder: coder(args[0]).y_hat.to(out.dtype)
            )
        )
    total, count = 0.0, 0
    for tokens in evaluator.tokens_BT.split(4):
        logits = evaluator.model(tokens).logits[:, :-1].flatten(0, 1).float()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"))
        count += tokens[:, 1:].numel()
    for handle in handles:
        handle.remove()
    assert rows[1]["ce_spliced_all"] == pytest.approx(total / count, rel=1e-6)
    single = {row["hookpoint"]: row for row in read(table) if row.get("seed") == 1}
    assert rows[1]["kl_spliced_all"] > max(row["kl_spliced_all"] for row in single.values())


def test_two_coders_of_one_mlp_cannot_be_spliced_together(sweep: Path) -> None:
    shutil.copytree(sweep / "0", sweep / "again")
    with pytest.raises(UserError, match="replace the same MLP"):
        evaluate(EvaluateConfig(runs=f"{sweep}/[a0]*", out=str(sweep / "t.json"), ce_tokens=128, together=True))


def test_saebench_reads_its_form(table: Path, sweep: Path) -> None:
    files = sorted((sweep / "saebench").rglob("*.json"))
    assert [file.parent.name for file in files] == ["core"] * 6
    row = read(table)[0]
    for file in files:
        found = TypeAdapter(CoreEvalOutput).validate_python(json.loads(file.read_text()))
        assert found.eval_result_metrics.sparsity.l0 > 0
    assert (sweep / "0" / "evaluation.json").exists() and row["l2_norm_in"] > 0


def test_every_other_evaluation_in_saebench_s_form(sweep: Path, tmp_path: Path) -> None:
    probing = {f"{of}{k}": 0.5 for of in ("", "y_dims_") for k in ("k1", "k2", "k5")} | {"dense_y": 0.9}
    letters = [{"letter": "a", "words": 9, "full": 1 / 3, "fraction": 0.4, "split": [1, 2], "probe_f1": 0.9}]
    row = {
        "absorption_full": 0.1, "absorption_details": letters,
        **{f"probing_{key}": value for key, value in probing.items()},
        "probing_details": [{"dataset": "one", **probing}],
        **{f"{name}_{n}": 0.2 for name in ("scr", "tpp") for n in (2, 5, 10, 20, 50, 100, 500)},
        "ravel_disentangle": 0.5, "ravel_cause": 0.1, "ravel_isolation": 0.9,
    }  # fmt: skip
    for file in saebench.write(Run.open(sweep / "0"), row, tmp_path):
        TypeAdapter(CLASSES.pop(file.parent.name)).validate_python(json.loads(file.read_text()))
    assert set(CLASSES) == {"core"}


def test_results_of_several_tasks_are_kept_together_until_the_weights_change(sweep: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(sweep / "6", tmp_path / "run"))
    evaluate(EvaluateConfig(run=str(run), ce_tokens=128))
    result = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(result | {"probing_k1": 0.7}))
    evaluate(EvaluateConfig(run=str(run), ce_tokens=128))
    assert json.loads((run / "evaluation.json").read_text())["probing_k1"] == 0.7
    (run / "evaluation.json").write_text(json.dumps(result | {"probing_k1": 0.7, "weights": "others"}))
    evaluate(EvaluateConfig(run=str(run), ce_tokens=128))
    assert "probing_k1" not in json.loads((run / "evaluation.json").read_text())


def test_results_of_a_task_replace_all_of_its_earlier_ones(sweep: Path, tmp_path: Path) -> None:
    """Whether it was asked otherwise then, or could give none."""
    run = Run.open(Path(shutil.copytree(sweep / "6", tmp_path / "run")))
    before = record(run, {"fvu": 0.1, "probing_k1": 0.7, "probing_seconds": 1.0})
    assert before.items() <= record(run, {"absorption_problem": "no words", "absorption_seconds": 1.0}).items()
    found = record(run, {"absorption_full": 0.5, "split_latents": 1.5, "absorption_seconds": 1.0})
    assert "absorption_problem" not in found and before.items() <= found.items()
    assert "split_latents" not in record(run, {"absorption_problem": "no words", "absorption_seconds": 1.0})
    assert "probing_k1" not in record(run, {"probing_k2": 0.7, "probing_seconds": 1.0})
    record(run, {"ce_spliced_ci": [1, 2], "documents": 30, "fvu_ci": [0, 1], "evaluation_seconds": 1.0})
    found = record(run, {"fvu": 0.2, "evaluation_seconds": 1.0})
    assert not {"ce_spliced_ci", "documents", "fvu_ci"} & found.keys() and {"probing_k2": 0.7}.items() <= found.items()


def test_long_rows_are_counted_by_default(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "CE_TOKENS", 64)  # four rows
    assert len(Evaluator(store, None, 4, "cpu").tokens_BT) == 8  # all that are held out


def test_bad_input_is_named(sweep: Path, store: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"out=FILE"):
        EvaluateConfig(run="r", controls=[Control.affine])
    with pytest.raises(UserError, match="tasks="):
        EvaluateConfig(run="r", tasks=[])
    run = Run.open(sweep / "6")
    run.coder.meta["hookpoint"] = "layers.9.mlp"
    with pytest.raises(UserError, match=r"trained on layers.9.mlp, which .* lacks"):
        run.check(store)


def test_a_task_that_the_model_cannot_do_loses_nothing_else(sweep: Path, capsys: pytest.CaptureFixture) -> None:
    out = sweep / "few.json"
    evaluate(
        EvaluateConfig(
            runs=str(sweep / "6"), out=str(out), ce_tokens=128, controls=[Control.affine],
            tasks=[TaskName.absorption, TaskName.ravel, TaskName.core],
        )
    )  # fmt: skip
    (row,) = read(out)
    assert row["fvu"] < 1 and "knows too few cities" in row["ravel_problem"]
    assert "vocabulary holds only" in row["absorption_problem"] and "absorption: " in capsys.readouterr().out
