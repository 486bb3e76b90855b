"""Probing of planted features, and the labelled texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from skipcoder.errors import UserError
from skipcoder.evals.config import ErasureConfig, ProbingConfig
from skipcoder.evals.tasks import ablation, labelled, scr, tpp
from skipcoder.evals.tasks.probing import LabelledSplit, chosen

RNG = np.random.default_rng(0)
TRAIN, TEST = 400, 200
LABELS = np.arange(TRAIN + TEST) % 2


def task(ks: tuple[int, ...] = (1, 2)) -> LabelledSplit:
    return LabelledSplit(LABELS[:TRAIN], LABELS[TRAIN:], ks)


def noise() -> np.ndarray:
    return np.abs(RNG.standard_normal((len(LABELS), 40)))


def test_a_planted_latent_is_found_and_permuted_labels_are_at_chance() -> None:
    features = noise()
    features[:, 17] += 5 * LABELS
    found = task().sparse(scipy.sparse.csr_array(features))
    assert found["k1"] > 0.97 and found["k1_auc"] > 0.99
    assert found == task().sparse(features)  # sparse or not
    permuted = [
        LabelledSplit(RNG.permutation(LABELS[:TRAIN]), LABELS[TRAIN:], (1,)).sparse(noise())["k1"] for _ in range(20)
    ]
    # 20 x 200 independent guesses: a standard deviation of 0.008
    assert np.mean(permuted) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(20 * TEST))
    assert abs(task().sparse(features, permuted=True)["k1"] - 0.5) < 0.2


def test_neither_choice_sees_the_test_texts() -> None:
    """A latent that tells the classes in the test texts alone is of no use."""
    features = noise()
    features[TRAIN:, 3] += 50 * LABELS[TRAIN:]
    assert task().sparse(features)["k1"] < 0.65


def test_dense_probe_finds_what_no_single_column_tells() -> None:
    features = RNG.standard_normal((len(LABELS), 40)) + 0.3 * LABELS[:, None]
    assert task().dense(features) > task().sparse(features)["k1"] + 0.1


def test_bundled_data_are_the_113_binary_tasks_of_sae_probes() -> None:
    names = labelled.binary_names()
    assert len(names) == 113
    assert len(chosen(ProbingConfig())) == 20 and chosen(ProbingConfig(datasets=["all"])) == names
    data = labelled.find("161_agnews_0")
    places = labelled.balanced(data.labels, 200, "seed")
    assert len(set(places)) == 200 and data.labels[places].mean() == 0.5
    assert np.array_equal(places, labelled.balanced(data.labels, 200, "seed"))
    assert not np.array_equal(places, labelled.balanced(data.labels, 200, "another"))


def test_the_same_text_is_not_in_training_and_in_test() -> None:
    """Cut alike is the same; of contradictory labels nothing stays, nor of a text without a token."""
    data = labelled.Labelled("d", list("abcdef"), np.array([0, 1, 0, 1, 0, 1]), ["n", "y"])
    rows = [[0, 5], [0, 6], [0, 5], [0, 7], [0, 7], [0]]
    kept, cut = labelled.distinct(data, rows)
    assert kept.texts == ["a", "b"] and kept.labels.tolist() == [0, 1] and cut == [[0, 5], [0, 6]]


def test_csv_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text('prompt,target,spurious\n"a, b\nc",yes,1\nd,no,0\ne,yes,1\n')
    data = labelled.find(str(path))
    assert data.texts == ["a, b\nc", "d", "e"] and data.classes == ["no", "yes"] and data.labels.tolist() == [1, 0, 1]
    assert labelled.load(path, target="spurious").labels.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"mine.csv has no column 'label'; it has prompt, target, spurious"):
        labelled.load(path, target="label")
    path.write_text("prompt,target\na,1\nb,1\n")
    with pytest.raises(UserError, match="two classes are needed"):
        labelled.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        labelled.find(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="no data set 'mine' in sae-probes"):
        labelled.find("mine")


def planted_erasure(monkeypatch: pytest.MonkeyPatch, labels: np.ndarray, latent_of: np.ndarray) -> Any:
    """Every text's y is that of its latents, with a little noise; latent i writes along dimension i."""
    W_dec = np.eye(12)

    class FakeRun:
        class coder:  # noqa: N801
            W_dec = torch.eye(12, dtype=torch.float64)

            class cfg:  # noqa: N801
                width = 12

    def read(reader: object, runs: list, rows: list) -> Iterator[tuple[Any, np.ndarray, Any]]:
        rng = np.random.default_rng(1)
        codes = 0.05 * rng.random((len(labels), 12))
        for column in latent_of.T:
            codes[np.arange(len(labels)), column] += 3
        kept = [row[1] for row in rows]
        yield FakeRun, codes[kept] @ W_dec, scipy.sparse.csr_array(codes[kept])

    monkeypatch.setattr(ablation, "read", read)

    class FakeReader:
        def tokens(self, texts: list[str], most: int) -> list[list[int]]:
            return [[0, int(text)] for text in texts]

    return FakeReader()


def test_tpp_of_planted_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ablating a class' one latent takes its probe from right to always-no (balanced accuracy 1/2) and no other's."""
    labels = np.arange(300) % 3
    reader = planted_erasure(monkeypatch, labels, labels[:, None])
    data = labelled.Labelled("toy", [str(i) for i in range(300)], labels, ["a", "b", "c"])
    monkeypatch.setattr(labelled, "find", lambda name: data)
    (found,) = tpp.tpp(reader, [None], ErasureConfig(texts=300, ablate=[2, 50]))  # type: ignore[list-item]
    assert found["tpp_2"] == pytest.approx(0.5, abs=0.05)
    assert found["tpp_2_ci"][0] <= found["tpp_2"] <= found["tpp_2_ci"][1]
    assert "tpp_50" not in found  # more latents than there are


def test_scr_of_a_planted_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spurious attribute's latent is the stronger one; without it the biased probe reads the wanted one."""
    rng = np.random.default_rng(0)
    attributes = rng.integers(0, 2, (800, 2))
    latents = np.stack([attributes[:, 0], 2 + attributes[:, 1], 2 + attributes[:, 1]], 1)
    reader = planted_erasure(monkeypatch, attributes, latents)
    monkeypatch.setattr(scr, "two_attributes", lambda cfg: ([str(i) for i in range(800)], attributes))
    (found,) = scr.scr(reader, [None], ErasureConfig(texts=800, ablate=[2]))  # type: ignore[list-item]
    assert found["scr_accuracy_oracle"] > 0.99
    assert found["scr_accuracy_biased"] < 0.9
    assert found["scr_2"] > 0.9


def test_scr_reads_two_labels_of_one_text(tmp_path: Path) -> None:
    texts, attributes = scr.two_attributes(ErasureConfig())
    assert len(texts) == len(attributes) == 573
    path = tmp_path / "two.csv"
    path.write_text("prompt,target,spurious\na,1,x\nb,0,y\nc,1,z\n")
    with pytest.raises(UserError, match="two values each"):
        scr.two_attributes(ErasureConfig(scr_csv=str(path)))
    path.write_text("prompt,target,spurious\n" + "a,1,x\nb,0,y\n" * 10)
    with pytest.raises(UserError, match="16 texts or more"):
        scr._scr_split(scr.two_attributes(ErasureConfig(scr_csv=str(path)))[1] @ [2, 1], 100)
