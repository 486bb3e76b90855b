"""What is said of a coder on each of its sides."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.evals.circuits.trace import Tracer
from skipcoder.evals.config import EvaluateConfig, TaskName
from skipcoder.evals.core.by_side import by_side, norm_shares
from skipcoder.evals.core.metrics import ReconstructionMetrics, Targets
from skipcoder.evals.core.results import BY_DOCUMENT
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.explorer.explorer import Explorer
from skipcoder.evals.export.export import export
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.evals.splice.splice import splice
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, Kind
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.formats.config import ExportConfig, Target
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

NAMES = ["layers.0.mlp", "layers.2.mlp"]


@pytest.fixture(scope="module")
def crosscoder(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crosscoder") / "run"
    cfg = config(store, Kind.crosscoder)
    cfg.hookpoint = "layers.{0,2}.mlp"
    training.train(cfg, path)
    return path


def test_fvu_is_the_mean_over_sides_and_so_are_its_documents() -> None:
    rng = torch.Generator().manual_seed(0)
    documents = torch.arange(1000) // 25
    y = torch.randn(1000, 5, generator=rng) * torch.tensor([1, 1, 30, 30, 30])
    y_hat = y + torch.randn(1000, 5, generator=rng) * torch.tensor([0.5, 0.5, 3, 3, 3])
    none = torch.zeros(1000, 1, dtype=torch.int64)
    targets = Targets([2, 3], 40)
    metrics = ReconstructionMetrics(8, targets)
    metrics.update(targets.add(y, documents), y_hat, none.float(), none)
    found = metrics.result()
    each = []
    for part, side in zip((slice(0, 2), slice(2, 5)), found["sides"], strict=True):
        a, b = y[:, part].double(), y_hat[:, part].double()
        each.append(float((a - b).square().sum() / (a - a.mean(0)).square().sum()))
        assert side["fvu"] == pytest.approx(each[-1], rel=1e-9)
        assert side["fvu_ci"][0] < each[-1] < side["fvu_ci"][1]
        alone = Targets([part.stop - part.start], 40)  # as if it were the only one
        of_it = ReconstructionMetrics(8, alone)
        of_it.update(alone.add(y[:, part], documents), y_hat[:, part], none.float(), none)
        assert of_it.result()["fvu_ci"] == pytest.approx(side["fvu_ci"], rel=1e-9)
    assert found["fvu"] == pytest.approx(sum(each) / 2, rel=1e-9)
    assert found[BY_DOCUMENT]["fvu"].value == pytest.approx(found["fvu"], rel=1e-9)
    assert found["fvu_ci"][0] < found["fvu"] < found["fvu_ci"][1]


def test_shares_are_of_norms_in_units_of_each_side() -> None:
    coder = SparseCoder(CoderConfig(kind=Kind.crosscoder, k=1, width=4), 4, 4).requires_grad_(False)
    facts: Any = [
        {"hookpoint": name, "side": "output", "module": name, "width": 2, "scale": 1.0, "variance": variance}
        for name, variance in zip(NAMES, (1.0, 100.0), strict=True)
    ]
    coder.meta = {"sides": facts}
    coder.W_dec.copy_(torch.tensor([[3.0, 4, 0, 0], [0, 0, 1, 0], [0, 3, 0, 30], [1, 0, 0.1, 0]]))
    shares = norm_shares(coder)
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [1 / 1.01, 0.01 / 1.01]]))
    found = by_side(coder, torch.tensor([5, 0, 7, 1]), [{"fvu": 0.1}, {"fvu": 0.2}])  # latent 1 never fires
    assert [(side["hookpoint"], side["fvu"], side["exclusive"]) for side in found] == [
        ("layers.0.mlp", 0.1, 2), ("layers.2.mlp", 0.2, 0),
    ]  # fmt: skip
    assert sum(side["norm_share"] for side in found) == pytest.approx(1)


@pytest.mark.slow
def test_evaluation_of_a_run(crosscoder: Path, store: ActivationStore) -> None:
    (row,) = evaluate(EvaluateConfig(run=str(crosscoder), ce_tokens=128, tasks=[TaskName.core, TaskName.contextfree]))
    found = json.loads((crosscoder / "evaluation.json").read_text())
    assert "no one MLP" in found["ce_problem"] and "ce_spliced" not in found
    assert "for coders of one MLP, not for a crosscoder" in found["contextfree_problem"]
    run = Run.open(crosscoder)
    (batch,) = ActivationStream(store, NAMES, 2**20, split="test", epochs=1, filter=run.filter)
    y = torch.cat(batch.side(NAMES, "output"), 1)
    error = y.double() - run.coder(y).y_hat.double()
    fvus = [
        float(e.square().sum() / (t - t.mean(0)).square().sum())
        for e, t in zip(error.split(24, 1), y.double().split(24, 1), strict=True)
    ]
    assert [side["hookpoint"] for side in row["sides"]] == NAMES
    assert [side["fvu"] for side in row["sides"]] == pytest.approx(fvus, rel=1e-5)
    assert row["fvu"] == pytest.approx(sum(fvus) / 2, rel=1e-5)


@pytest.mark.slow
def test_where_its_latents_fire(crosscoder: Path, store: ActivationStore) -> None:
    run = Run.open(crosscoder)
    index = LatentIndex(run, store)
    index.build("cpu")
    total = 0
    for split in ("train", "validation", "test"):
        for batch in ActivationStream(store, NAMES, 512, split=split, epochs=1, filter=run.filter):
            total += int((run.coder(batch.row(run.reads)).values > 0).sum())
    assert int(index.counts.sum()) == total > 0


@pytest.mark.slow
def test_what_is_for_coders_of_one_mlp_says_so(
    crosscoder: Path, store: ActivationStore, lm: Any, tmp_path: Path
) -> None:
    def circuit() -> Any:
        return Tracer(CircuitConfig(run=str(crosscoder.parent), prompt="a", out=str(tmp_path / "c")))

    def exported() -> Any:
        return export(ExportConfig(run=str(crosscoder), format=Target.sparsify, out=str(tmp_path / "e")), [crosscoder])

    coder = SparseCoder.load(crosscoder)
    for attempt in (
        circuit,
        exported,
        lambda: Explorer(Run.open(crosscoder), store, "cpu"),
        lambda: evaluate(EvaluateConfig(runs=str(crosscoder), together=True, out=str(tmp_path / "t.json"))),
        lambda: splice(lm, {"model.layers.1.mlp": coder}).__enter__(),
    ):
        with pytest.raises(UserError, match=r"for coders of one MLP, not for a crosscoder|of several sides at once"):
            attempt()
