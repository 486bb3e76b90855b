import numpy as np
import pytest
import torch
from scipy.stats import t as student

from skipcoder.evals.core.metrics import ReconstructionMetrics, Targets
from skipcoder.evals.core.results import BY_DOCUMENT


def metrics(y: torch.Tensor, y_hat: torch.Tensor, batch: int = 100) -> dict:
    targets = Targets([y.shape[1]])
    m = ReconstructionMetrics(8, targets)
    values = torch.tensor([[1.0, 0.0]]).expand(len(y), 2)
    indices = torch.tensor([[3, 5]]).expand(len(y), 2)
    for i in range(0, len(y), batch):
        part = slice(i, i + batch)
        m.update(targets.add(y[part]), y_hat[part], values[part], indices[part])
    return m.result()


@pytest.fixture
def y() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(1000, 5, generator=g) * torch.tensor([1.0, 2, 3, 4, 50]) + torch.tensor([0.0, 0, 9, 0, 300])


def test_perfect_reconstruction(y: torch.Tensor) -> None:
    result = metrics(y, y)
    assert result["fvu"] == result["fvu_per_dim"] == 0
    assert result["explained_variance"] == 1 and result["cosine"] == pytest.approx(1)


def test_mean_predictor_has_fvu_1(y: torch.Tensor) -> None:
    result = metrics(y, y.double().mean(0).expand_as(y))
    assert result["fvu"] == pytest.approx(1, rel=1e-12)
    assert result["fvu_per_dim"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_scale_changes_nothing(y: torch.Tensor, scale: float) -> None:
    y_hat = y + torch.randn_like(y)
    assert metrics(y * scale, y_hat * scale)["fvu"] == pytest.approx(metrics(y, y_hat)["fvu"], rel=1e-12)


def test_definition_and_batches(y: torch.Tensor) -> None:
    y_hat = y + torch.randn_like(y)
    error, centred = (y.double() - y_hat.double()).square(), (y.double() - y.double().mean(0)).square()
    for batch in (1, 7, 1000):
        result = metrics(y, y_hat, batch)
        assert result["fvu"] == pytest.approx(float(error.sum() / centred.sum()), rel=1e-10)
        assert result["fvu_per_dim"] == pytest.approx(float((error.sum(0) / centred.sum(0)).mean()), rel=1e-10)


def test_dimensions_without_variance_are_counted_not_divided_by(y: torch.Tensor) -> None:
    y[:, 1] = 7
    result = metrics(y, y + 1)
    assert result["flat_dims"] == 1 and result["fvu_per_dim"] < 1e3


def test_latents(y: torch.Tensor) -> None:
    """Latent 3 fires on every token; 5 is chosen with value 0, which is not firing."""
    result = metrics(y, y)
    assert result["l0"] == 1 and result["dead_fraction"] == 7 / 8 and result["n"] == 1000
    assert sum(result["density_histogram"]["latents"]) == 1
    assert result["density_histogram"]["latents"][-1] == 1


def test_interval_of_fvu_is_that_of_fvus_computed_anew_without_each_document() -> None:
    """Tokens of a document are alike, so that taking each for itself would be far too sure."""
    rng = torch.Generator().manual_seed(0)
    documents = torch.arange(1000) // 25
    y = torch.randn(40, 5, generator=rng)[documents] + 0.3 * torch.randn(1000, 5, generator=rng) + 100
    y_hat = y + torch.randn(40, 5, generator=rng)[documents]
    none, order, intervals = torch.zeros(1000, 1, dtype=torch.int64), torch.randperm(1000, generator=rng), []
    for place in (documents, torch.arange(1000)):
        targets = Targets([5], len(place.unique()))
        m = ReconstructionMetrics(8, targets)
        for part in order.split(437):  # in a stream's order, where each batch is a sample of the whole
            m.update(targets.add(y[part], place[part]), y_hat[part], none[part].float(), none[part])
        result = m.result()
        intervals.append(result["fvu_ci"])
        assert result["documents"] == len(place.unique())
        assert result[BY_DOCUMENT]["fvu"].value == pytest.approx(result["fvu"], rel=1e-12)
    found = []
    for document in range(40):
        part, part_hat = (z[documents != document].double() for z in (y, y_hat))
        found.append(float((part - part_hat).square().sum() / (part - part.mean(0)).square().sum()))
    half = student.ppf(0.975, 39) * np.sqrt(39 / 40 * np.square(np.log(found) - np.log(found).mean()).sum())
    assert intervals[0] == pytest.approx([result["fvu"] * np.exp(-half), result["fvu"] * np.exp(half)], rel=0.02)
    (low, high), (low_tokens, high_tokens) = intervals
    assert high - low > 2 * (high_tokens - low_tokens)


def test_the_rarest_latents_are_in_the_histograms_first_bin(y: torch.Tensor) -> None:
    targets = Targets([5])
    m = ReconstructionMetrics(8, targets)
    m.update(targets.add(y), y, torch.ones(1000, 1), torch.full((1000, 1), 3))
    targets.n = 10**12
    assert m.result()["density_histogram"]["latents"][0] == 1


def test_lengths(y: torch.Tensor) -> None:
    result = metrics(y, 0.5 * y)
    assert result["l2_ratio"] == pytest.approx(0.5) and result["relative_reconstruction_bias"] == pytest.approx(0.5)
    assert result["dense_fraction"] == 1 / 8
