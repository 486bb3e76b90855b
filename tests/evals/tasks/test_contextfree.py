"""Tables of tokens predict what depends on tokens, and nothing else; against plain loops."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from skipcoder.evals.config import ContextFreeConfig, EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.tasks.contextfree import CONTEXTS, SEEN, Sample, _contexts, contextfree, entropy, r_squared
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import Kind
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

V = 12


def sample(rng: np.random.Generator, n: int) -> Sample:
    """Latent 0 follows the token, 1 the token before, 2 both together, 3 nothing."""
    token, before, earlier = rng.integers(0, V, (3, n))
    noise = 0.1 * rng.random((n, 4))
    codes = np.stack([token == 3, before == 5, (token + before) % 7 == 0, rng.random(n) < 0.2], 1) * (1 + noise)
    pair = before * V + token
    contexts = {"token": token, "before": before, "pair": pair, "triple": earlier * V**2 + pair}
    return Sample(scipy.sparse.csr_array(codes), contexts)


@pytest.fixture(scope="module")
def both() -> tuple[Sample, Sample]:
    rng = np.random.default_rng(0)
    return sample(rng, 6000), sample(rng, 3000)


def test_each_latent_follows_from_what_it_was_made_of(both: tuple[Sample, Sample]) -> None:
    train, test = both
    token, before, pair, triple = (r_squared(train, test, levels) for levels in CONTEXTS.values())
    assert token[0] > 0.95 and before[0] < 0.01
    assert before[1] > 0.95 and token[1] < 0.01
    assert pair[2] > 0.95 and max(token[2], before[2]) < 0.05
    assert max(of[3] for of in (token, before, pair)) < 0.01
    assert 0.5 < triple[2] <= pair[2]  # rarer contexts have poorer means
    for levels in CONTEXTS.values():
        assert r_squared(train, test.shuffled(), levels).max() < 0.01


@pytest.mark.parametrize("levels", CONTEXTS.values())
def test_r_squared_is_that_of_a_plain_loop(both: tuple[Sample, Sample], levels: tuple[str, ...]) -> None:
    train, test = both
    a, b = train.codes_NM.toarray(), test.codes_NM.toarray()
    rows: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for i, row in enumerate(a):
        for level in levels:
            rows[level, int(train.contexts[level][i])].append(row)
    predicted = np.empty_like(b)
    for i in range(len(b)):
        known = [rows[level, int(test.contexts[level][i])] for level in levels]
        means = [np.mean(found, 0) for found in known if len(found) >= SEEN]
        predicted[i] = means[0] if means else a.mean(0)
    wanted = 1 - np.square(b - predicted).sum(0) / np.square(b - b.mean(0)).sum(0)
    np.testing.assert_allclose(r_squared(train, test, levels), wanted, rtol=1e-9, atol=1e-12)


def test_entropy(both: tuple[Sample, Sample]) -> None:
    one_token, other, _, chance = entropy(both[0])
    assert one_token == 0 and abs(chance - np.log2(V)) < 0.05 and abs(other - np.log2(V)) < 0.05
    assert abs(entropy(both[0].shuffled())[0] - np.log2(V)) < 0.1


def test_contexts_are_equal_where_the_tokens_are(store: ActivationStore) -> None:
    """Whatever is asked for together, and whatever its largest token is."""
    rows, T = store.read("tokens", 0, store.rows), store.context
    found, tokens = [], []
    for unit in store.units:
        position = np.arange(*store.unit_range(unit))[::-1]
        found.append(_contexts(store, position))
        padded = np.pad(rows, ((0, 0), (2, 0)), constant_values=-1)
        row, inside = np.divmod(position, T)
        tokens.append(np.stack([padded[row, inside + 2 - back] for back in range(3)], 1))
    assert len({of.max() for of in tokens}) > 1
    for name, columns in (("token", [0]), ("before", [1]), ("pair", [0, 1]), ("triple", [0, 1, 2])):
        codes = np.concatenate([of[name] for of in found])
        named = [tuple(row) for row in np.concatenate(tokens)[:, columns].tolist()]
        assert len(set(zip(codes.tolist(), named, strict=True))) == len(set(named)) == len(set(codes.tolist()))


def test_of_runs(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command's path; runs together give what each gives alone."""
    monkeypatch.setattr("skipcoder.evals.tasks.contextfree.FIRING", 2)
    for kind in (Kind.sae, Kind.transcoder):
        training.train(config(store, kind), tmp_path / kind.value)
    evaluate(EvaluateConfig(runs=f"{tmp_path}/*", tasks=["contextfree"]))
    for kind in (Kind.sae, Kind.transcoder):
        found: dict[str, Any] = json.loads((tmp_path / kind.value / "evaluation.json").read_text())
        (alone,) = contextfree(store, "layers.1.mlp", [Run.open(tmp_path / kind.value)], ContextFreeConfig())
        assert alone.items() <= found.items() and found["contextfree_latents"] > 5
        assert found["contextfree_token"] > found["contextfree_token_shuffled"]
        assert found["contextfree_entropy"] < found["contextfree_entropy_shuffled"]
