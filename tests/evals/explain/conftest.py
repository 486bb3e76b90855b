"""A run whose latents fire on words that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import Kind
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

LATENTS = 9


@pytest.fixture(scope="module")
def planted(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose latents 0 to 8 fire on one word each, 9 on two of those, 10 on almost nothing."""
    path = tmp_path_factory.mktemp("planted") / "run"
    training.train(config(store, Kind.transcoder), path)
    index = LatentIndex(Run.open(path), store)
    words = frequent_words(index)
    index.folder.mkdir()
    (units,) = index.parts
    flat = index.tokens.ravel()
    columns = [np.flatnonzero(flat == word) for word in words]
    columns += [np.sort(np.concatenate(columns[:2])), np.array([5, 77])]
    columns += [np.zeros(0, np.int64)] * (index.width - len(columns))
    values = [1 + (column % 7).astype(np.float32) for column in columns]
    starts = np.cumsum([0, *map(len, columns)])
    tensors = {"starts": starts, "position": np.concatenate(columns), "value": np.concatenate(values)}
    save_file(tensors, index._file(units))
    (index.folder / "identity.json").write_text(json.dumps(index.identity()))
    return path


def frequent_words(index: LatentIndex) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(index.store.attrs["model"]["id"])
    token, count = np.unique(index.tokens, return_counts=True)
    order = token[np.argsort(-count, kind="stable")]
    # Calibration's own words have four letters or more.
    words = [
        int(t)
        for t in order
        if tokenizer.decode([int(t)]).strip().isalpha() and len(tokenizer.decode([int(t)]).strip()) < 4
    ]
    seen: dict[str, int] = {}
    for word in words:  # "re" and " re" would be one word to the oracle
        seen.setdefault(tokenizer.decode([word]).strip(), word)
    return list(seen.values())[5 : 5 + LATENTS]
