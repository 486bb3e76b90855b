"""Runs dealt out over a Ray cluster are evaluated and indexed as in one process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skipcoder.cluster import deal
from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig, InterpretConfig, ShareConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.interpret import interpret
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.bank import train_bank
from skipcoder.trainer.run.run import Run
from tests.trainer.bank.test_bank import config

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def runs(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    jobs = [(config(store, steps=4, k=k), folder / f"k{k}") for k in (2, 3, 4)]
    assert all(outcome.error is None for outcome in train_bank(jobs))
    return folder


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two machines with a core each, and a head without."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from ray.cluster_utils import Cluster

    found: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()


def table(folder: Path, name: str, **keys: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, without times, and one run's own file."""
    evaluate(EvaluateConfig(runs=f"{folder}/k*", out=str(folder / f"{name}.json"), ce_tokens=128, **keys))
    rows = json.loads((folder / f"{name}.json").read_text())
    own = json.loads((folder / "k3" / "evaluation.json").read_text())
    for row in (*rows, own):
        for key in [key for key in row if key.endswith("seconds")]:
            del row[key]
    return rows, own


def test_the_table_is_that_of_one_process(runs: Path, tmp_path: Path, cluster: Any) -> None:
    here, there = (Path(shutil.copytree(runs, tmp_path / "r", dirs_exist_ok=True)) for _ in range(2))
    alone = table(here, "one")
    dealt = table(there, "two", ray=ShareConfig(address=cluster.address, tasks=2))
    assert dealt == alone
    assert [row["k"] for row in dealt[0]] == [2, 3, 4]
    assert (there / "report.html").is_file()

    interpret(InterpretConfig(runs=f"{there}/k*", pages=False, ray=ShareConfig(address=cluster.address, tasks=2)))
    for path in sorted(there.glob("k*")):
        run = Run.open(path)
        assert not LatentIndex(run, ActivationStore.open(run.store_path)).missing()


def _refuse(share: Any) -> None:
    if 3 in share:
        raise UserError("three is one too many")
    if 5 in share:
        raise KeyError("five")


def test_a_mistake_in_a_task_is_said_as_one(cluster: Any) -> None:
    assert deal(list, [1, 2, 4], cluster.address, 2) == [[1], [2, 4]]
    with pytest.raises(UserError, match="three is one too many"):
        deal(_refuse, [1, 2, 3], cluster.address, 2)
    with pytest.raises(Exception, match=r"(?s)_refuse.*KeyError: 'five'"):  # with where it came from
        deal(_refuse, [1, 5], cluster.address, 1)
    with pytest.raises(UserError, match=r"ray.tasks=0: must be at least 1"):
        ShareConfig(tasks=0)
