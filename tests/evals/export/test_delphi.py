"""eai-delphi's own loader reads what we write. Skipped where delphi is not at hand:

    pip install --no-deps --target DIR eai-delphi jaxtyping wadler-lindig orjson aiofiles simple-parsing \
        docstring-parser asyncer beartype blobfile faiss-cpu sentence-transformers eai-sparsify schedulefree plotly \
        tiktoken pycryptodomex lxml narwhals
    PYTHONPATH=DIR pytest tests/evals/export/test_delphi.py

delphi imports vllm; without a GPU an empty package of that name (LLM, SamplingParams, distributed.parallel_state with
destroy_distributed_environment and destroy_model_parallel, inputs.TokensPrompt) in DIR does.
"""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from skipcoder.evals.export.delphi import export
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow

delphi_latents = pytest.importorskip("delphi.latents", exc_type=ImportError)
delphi_config = pytest.importorskip("delphi.config")
WINDOW = 8


def test_delphi_finds_every_window_and_its_activations(store: ActivationStore, tmp_path: Path) -> None:
    training.train(config(store), tmp_path / "run")
    index = LatentIndex(Run.open(tmp_path / "run"), store)
    index.build("cpu")
    out = export(index, tmp_path / "delphi")
    chosen = np.flatnonzero(index.counts > 60)[:10]
    dataset = delphi_latents.LatentDataset(
        tmp_path / "delphi",
        delphi_config.SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2),
        delphi_config.ConstructorConfig(
            min_examples=4, n_non_activating=2, example_ctx_len=WINDOW, center_examples=True  # as windows lie
        ),
        tokenizer=AutoTokenizer.from_pretrained(store.attrs["model"]["id"]),
        modules=[out.name],
        latents={out.name: torch.tensor(chosen)},
    )  # fmt: skip

    async def read() -> dict[int, list]:
        return {record.latent.latent_index: record.examples async for record in dataset}

    found = asyncio.run(read())
    assert set(found) == set(chosen.tolist())
    windows_WT = index.tokens.reshape(-1, WINDOW)
    for latent, examples in found.items():
        dense = np.zeros(index.tokens.size, np.float16)
        dense[index.of(latent).position] = index.of(latent).value
        mine = {
            (tuple(tokens.tolist()), tuple(values.tolist()))
            for tokens, values in zip(windows_WT, dense.reshape(-1, WINDOW), strict=True)
            if values.any()
        }
        theirs = {(tuple(e.tokens.tolist()), tuple(e.activations.half().tolist())) for e in examples}
        assert theirs == mine
