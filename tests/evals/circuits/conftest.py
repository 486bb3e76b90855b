"""A set of coders of the tiny model, and a circuit of it."""

from pathlib import Path

import pytest

import skipcoder
from skipcoder import CoderConfig, LoopConfig, OptimConfig, StreamConfig
from skipcoder.evals.circuit import circuit
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.pipeline.store.reader import ActivationStore

PROMPT = "The stream of chunks is"


@pytest.fixture(scope="session")
def coders(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of coders of the tiny model."""
    folder = tmp_path_factory.mktemp("set")
    skipcoder.train_set(
        store,
        CoderConfig(kind="skip_transcoder", k=4, width=64),
        folder,
        "layers.*.mlp",
        train=LoopConfig(tokens=5120, batch_tokens=128),
        optim=OptimConfig(lr=1e-2),
        stream=StreamConfig(special_tokens=True),
    )
    return folder


@pytest.fixture(scope="session")
def traced(coders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("circuit")
    (folder,) = circuit(CircuitConfig(str(coders), PROMPT, out=str(out), verify=4, contexts=2, node_threshold=1))
    assert folder == out
    return out
