"""A cross-layer transcoder is evaluated as one: its layers' FVUs, and all of its MLPs replaced at once."""

from typing import Any

import pytest
import torch

from skipcoder.evals.config import EvaluateConfig, TaskName
from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import CoderConfig, Kind
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow
NAMES = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


@pytest.fixture(scope="module")
def run(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Run:
    cfg = config(store, Kind.sae)
    cfg.hookpoint, cfg.coder = "layers.*.mlp", CoderConfig(kind=Kind.skip_clt, k=4, width=64)
    path = tmp_path_factory.mktemp("clt") / "run"
    training.train(cfg, path)
    return Run.open(path)


def test_fvu_by_layer_and_cross_entropy(run: Run, store: ActivationStore) -> None:
    (row,) = evaluate(EvaluateConfig(run=str(run.path), ce_tokens=128, tasks=[TaskName.core, TaskName.contextfree]))
    (batch,) = ActivationStream(store, NAMES, 2**20, split="test", epochs=1, filter=run.filter)
    x, y = (torch.cat(batch.side(NAMES, side), 1) for side in ("input", "output"))
    error = (y - run.coder(x).y_hat).double()
    fvus = [
        float(e.square().sum() / (t - t.mean(0)).square().sum())
        for e, t in zip(error.split(24, 1), y.double().split(24, 1), strict=True)
    ]
    assert [side["fvu"] for side in row["sides"]] == pytest.approx(fvus, rel=1e-4)
    assert row["fvu"] == pytest.approx(sum(fvus) / 3, rel=1e-4)
    shares = [side["from_earlier"] for side in row["sides"]]
    assert shares[0] == 0 and all(0.01 < share < 1 for share in shares[1:])
    assert row["l0"] == pytest.approx(12, abs=1)
    assert row["kl_spliced"] < row["kl_zero"] and row["ce_skip_only"] > 0
    assert "for coders of one MLP, not for a skip_clt" in row["contextfree_problem"]


@torch.no_grad()
def test_spliced_it_is_plain_hooks_on_all_layers(run: Run, store: ActivationStore) -> None:
    """What a layer writes to later ones comes from what it reads in the spliced model."""
    evaluator = Evaluator(store, 128, 4, "cpu", intervals=False)
    (found,) = evaluator.behaviour([run])
    coder: Any = run.coder
    model: Any = evaluator.model
    modules = dict(model.base_model.named_modules())
    codes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(layer: int) -> Any:
        def act(_: Any, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            x = args[0].reshape(-1, 24).float()
            one = coder.layers[layer]
            pre = (x @ one.W_enc.T + one.b_enc).relu()
            values, indices = pre.topk(4)
            codes.append((torch.zeros_like(pre).scatter(1, indices, values), x))
            total = x @ one.W_skip.T + one.b_dec
            for source, (f, _) in enumerate(codes):
                there = slice(24 * (layer - source), 24 * (layer - source + 1))
                total = total + f @ coder.layers[source].W_dec[:, there]
            return total.view_as(out).to(out)

        return act

    handles = [modules[name].register_forward_hook(hook(layer)) for layer, name in enumerate(NAMES)]
    losses = []
    for tokens in evaluator.tokens_BT.split(4):
        codes.clear()
        logits = evaluator.model(tokens).logits[:, :-1].float()
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        )
    for handle in handles:
        handle.remove()
    assert found["ce_spliced_all"] == pytest.approx(float(torch.cat(losses).mean()), rel=2e-3)
    assert found["ce_spliced_all"] != pytest.approx(found["ce_clean"], rel=1e-3)


def test_where_its_latents_fire(run: Run, store: ActivationStore) -> None:
    index = LatentIndex(run, store)
    index.build("cpu")
    assert len(index.counts) == 192
    total = torch.zeros(192)
    for split in ("train", "validation", "test"):
        for batch in ActivationStream(store, NAMES, 512, split=split, epochs=1, filter=run.filter):
            out = run.coder(batch.row(run.reads))
            total += torch.bincount(out.indices[out.values > 0], minlength=192)
    assert index.counts.tolist() == total.tolist() and (index.counts.reshape(3, 64).sum(1) > 0).all()
