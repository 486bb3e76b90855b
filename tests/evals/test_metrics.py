import pytest
import torch
from skipcoder.evals.metrics import ReconstructionMetrics


def metrics(y: torch.Tensor, y_hat: torch.Tensor, batch: int = 100) -> dict:
    m = ReconstructionMetrics(y.shape[1], 8)
    values = torch.tensor([[1.0, 0.0]]).expand(len(y), 2)
    indices = torch.tensor([[3, 5]]).expand(len(y), 2)
    for i in range(0, len(y), batch):
        part = slice(i, i + batch)
        m.update(y[part], y_hat[part], values[part], indices[part])
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


def test_interval_of_fvu_is_around_it_and_narrows(y: torch.Tensor) -> None:
    """Rows of ten tokens; the interval is that of FVUs computed anew on resampled rows."""
    y_hat, widths = y + 3 * torch.randn_like(y), []
    for n in (200, 1000):
        m = ReconstructionMetrics(5, 8)
        rows = torch.arange(n) // 10
        none = torch.zeros(n, 1, dtype=torch.int64)
        for part in torch.arange(n).split(37):  # a row may be cut by a batch
            m.update(y[part], y_hat[part], none[part].float(), none[part], rows[part])
        result = m.result()
        low, high = result["fvu_ci"]
        assert low < result["fvu"] < high
        widths.append(high - low)
    assert widths[1] < 0.7 * widths[0]
    rng, found = torch.Generator().manual_seed(1), []
    for _ in range(300):
        chosen = torch.randint(100, (100,), generator=rng)[:, None] * 10 + torch.arange(10)
        part, part_hat = y[chosen.flatten()].double(), y_hat[chosen.flatten()].double()
        found.append(float((part - part_hat).square().sum() / (part - part.mean(0)).square().sum()))
    ours = torch.tensor([low, high], dtype=torch.float64)
    theirs = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * (high - low))


def test_lengths(y: torch.Tensor) -> None:
    result = metrics(y, 0.5 * y)
    assert result["l2_ratio"] == pytest.approx(0.5) and result["relative_reconstruction_bias"] == pytest.approx(0.5)
    assert result["dense_fraction"] == 1 / 8
