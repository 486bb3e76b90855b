"""Texts through the tiny model: what is read is what plain hooks see."""

from typing import Any

import numpy as np
import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.evals.config import ErasureConfig, ProbingConfig
from skipcoder.evals.tables.saebench_adapter import SaeBenchSAE
from skipcoder.evals.tasks.probing import probing
from skipcoder.evals.tasks.ravel import Pair, Patch, Prompt, pairs_of
from skipcoder.evals.tasks.scr import scr
from skipcoder.evals.tasks.texts import Pooled, TextReader, pool_dense
from skipcoder.evals.tasks.tpp import tpp
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.coder.coder import CoderOutput
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow

TEXTS = ["def one(): return 1", "x", "a longer text, with some more tokens in it than the others have", "import os"]


@pytest.fixture(scope="module")
def reader(lm: Any, tiny_model: Any, store: ActivationStore) -> TextReader:
    from transformers import AutoTokenizer

    facts = store.hookpoints["layers.1.mlp"]
    return TextReader(lm, AutoTokenizer.from_pretrained(tiny_model), facts, [0, 1], batch_tokens=48)


@pytest.fixture(scope="module")
def run(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("run")
    training.train(config(store, Kind.skip_transcoder), path)
    return Run.open(path)


@torch.no_grad()
def test_padded_batches_give_what_each_text_gives_alone(reader: TextReader, lm: Any) -> None:
    rows = reader.tokens(TEXTS, most=20)
    assert all(row[0] == 0 and 1 < len(row) <= 21 for row in rows)
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}
    for batch in reader.read(rows):
        for i in batch.text_N.unique().tolist():
            found[i] = [batch.sides[side][batch.text_N == i] for side in ("input", "output")]
    for i, row in enumerate(rows):
        seen: list[torch.Tensor] = []
        handle = lm.base_model.layers[1].mlp.register_forward_hook(
            lambda _, args, out, seen=seen: seen.extend([args[0][0], out[0]])
        )
        lm(torch.tensor([row]))
        handle.remove()
        for got, wanted in zip(found[i], seen, strict=True):
            # Another batch shape may round a bf16 sum the other way, layer after layer.
            torch.testing.assert_close(got, wanted[1:].float(), rtol=0.05, atol=0.05)
    last = list(reader.read(rows, last_only=True))
    assert sum(len(batch.text_N) for batch in last) == 4
    for batch in last:
        for value, i in zip(batch.sides["output"], batch.text_N.tolist(), strict=True):
            assert torch.equal(value, found[i][1][-1])


def test_pooled_codes_are_means_over_tokens() -> None:
    pooled = Pooled(3, 5)
    pooled.add(
        CoderOutput(
            torch.zeros(3, 2), torch.tensor([[1.0, 0], [2, 4], [3, 0]]), torch.tensor([[1, 0], [1, 4], [2, 0]])
        ),
        torch.tensor([0, 0, 2]),
    )
    assert pooled.result().toarray().tolist() == [[0, 1.5, 0, 0, 2], [0] * 5, [0, 0, 3, 0, 0]]


@pytest.mark.cli
def test_probing_tpp_and_scr_on_real_texts(reader: TextReader, run: Run) -> None:
    """The commands' paths on a random model: numbers are what chance allows, baselines are there, n is stated."""
    (found,) = probing(reader, [run], ProbingConfig(datasets=["161_agnews_0", "92_glue_sst2"], texts=90, tokens=12))
    assert found["probing_datasets"] == 2 and [row["test"] for row in found["probing_details"]] == [30, 30]
    for key in ("k1", "k5_auc", "dense_x", "dense_y", "random_k2", "y_dims_k1", "permuted_k1"):
        assert 0 <= found[f"probing_{key}"] <= 1
    assert found["probing_gain_k2"] == pytest.approx(found["probing_k2"] - found["probing_random_k2"])
    (effects,) = tpp(reader, [run], ErasureConfig(texts=120, tokens=12, ablate=[2, 20]))
    assert effects["tpp_classes"] == ["Entertainment", "Politics", "Sport", "Technology"]
    assert -1 <= effects["tpp_2"] <= 1 and effects["tpp_texts"] == 60
    (cured,) = scr(reader, [run], ErasureConfig(tokens=12, ablate=[2, 20]))
    assert cured["scr_texts"] > 100 and "scr_20" in cured


def test_ablation_of_pooled_codes_is_that_of_every_token(reader: TextReader, run: Run) -> None:
    """Means are linear: y of each token without latent 0's part, averaged."""
    rows = reader.tokens(TEXTS)
    batches = list(reader.read(rows))
    pooled = Pooled(4, run.coder.cfg.width)
    without = torch.zeros(4, run.coder.d_out, dtype=torch.float64)
    counts = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        out = run.coder(batch.sides["input"])
        pooled.add(out, batch.text_N)
        part = (out.values * (out.indices == 3)).sum(1, keepdim=True) * run.coder.W_dec[3]
        without.index_add_(0, batch.text_N, (batch.sides["output"] - part).double())
        counts += torch.bincount(batch.text_N, minlength=4)
    y = pool_dense(batches, "output", 4)
    ours = y - pooled.result()[:, [3]] @ run.coder.W_dec.double().numpy()[[3]]
    np.testing.assert_allclose(ours, (without / counts[:, None]).numpy(), atol=1e-6)


@torch.no_grad()
def test_exchanged_latents_reach_the_logits(reader: TextReader, run: Run, lm: Any) -> None:
    """A mask of nothing changes nothing; one of everything leaves only what the coder does not explain."""
    prompts = []
    for text in TEXTS[2], TEXTS[0]:
        (tokens,) = reader.tokens([text])
        prompts.append(Prompt(text, "kind", tokens, at=4, answer=0))
    patch, pair = Patch(run, lm, reader), Pair(*prompts)
    plain = lm(torch.tensor([prompts[0].tokens])).logits[0, -1:]
    torch.testing.assert_close(patch.logits([pair], torch.zeros(64)), plain, rtol=0.05, atol=0.05)
    mlp = lm.base_model.layers[1].mlp
    (values, indices, _), (values_s, indices_s, _) = patch.facts(pair.base), patch.facts(pair.source)
    change = values_s @ run.coder.W_dec[indices_s] - values @ run.coder.W_dec[indices]

    def edit(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, 4] = (out[0, 4].float() + change).to(out.dtype)
        return out

    handle = mlp.register_forward_hook(edit)
    wanted = lm(torch.tensor([prompts[0].tokens])).logits[0, -1:]
    handle.remove()
    assert not torch.equal(wanted, plain)
    torch.testing.assert_close(patch.logits([pair], torch.ones(64)), wanted, rtol=0.05, atol=0.05)


def test_coders_with_varying_numbers_of_latents(
    reader: TextReader, store: ActivationStore, lm: Any, tmp_path: Any
) -> None:
    """batchtopk pads its codes with zeros of latent 0; neither RAVEL nor sae-bench's form may take them for real."""
    cfg = config(store, Kind.sae)
    cfg.coder = CoderConfig(kind=Kind.sae, k=4, width=64, activation=ActivationName.batchtopk)
    training.train(cfg, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    x = store.activations("layers.1.mlp", "output", 0, 64).float()
    sae = SaeBenchSAE(run.coder, "tiny", "blocks.1.hook_mlp_out", 1)
    assert (run.coder(x).values == 0).any()
    torch.testing.assert_close(sae(x), run.coder(x).y_hat, rtol=1e-5, atol=1e-5)
    assert sae.W_enc.shape == (24, 64) and sae.cfg.d_sae == 64
    prompts = [Prompt(t, "kind", reader.tokens([t])[0], at=4, answer=0) for t in (TEXTS[2], TEXTS[0], TEXTS[2][2:])]
    pairs = [Pair(prompts[0], prompts[1]), Pair(prompts[1], prompts[2])]
    patch = Patch(run, lm, reader)
    together = patch.logits(pairs, torch.ones(64))
    for row, pair in zip(together, pairs, strict=True):
        torch.testing.assert_close(row, patch.logits([pair], torch.ones(64))[0], rtol=0.05, atol=0.05)
    with pytest.raises(UserError, match="sae-bench evaluates SAEs alone"):
        run.coder.cfg.kind = Kind.transcoder
        SaeBenchSAE(run.coder, "tiny", "blocks.1.hook_mlp_out", 1)


def test_ravel_s_isolation_pairs_can_go_wrong() -> None:
    """Where base and source have the same answer, no patch could change it."""
    answers = {"a": (1, 7), "b": (2, 7), "c": (3, 8)}  # of the attribute in question, and of another
    prompts = [
        Prompt(city, attribute, [0], 0, answer)
        for city, both in answers.items()
        for attribute, answer in zip(("country", "continent"), both, strict=True)
    ]
    cause, isolation = pairs_of(prompts, "country", 99)
    assert len(cause) == 6
    assert {(pair.base.city, pair.source.city) for pair in isolation} == {
        ("a", "c"),
        ("b", "c"),
        ("c", "a"),
        ("c", "b"),
    }
