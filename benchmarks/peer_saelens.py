"""SAELens' reader of cached activations, for benchmarks/stream.py."""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcoder.pipeline.store.reader import ActivationStore

CONTEXTS_IN_BUFFER = (64, 1024)
"""`n_batches_in_buffer`: what its examples use, and what its documentation says that means (64 times 16 prompts)."""
PROMPTS = 16


def use(folder: Path) -> None:
    """Make the installed package importable."""
    sys.path.insert(0, str(folder))


def _write(rows: Iterator[np.ndarray], context: int, width: int, path: Path) -> None:
    """Rows [context, width] in its cache format, float32 as it writes by default (bfloat16 it cannot)."""
    from datasets import Array2D, Dataset, Features

    features = Features({"hook": Array2D((context, width), "float32")})
    Dataset.from_generator(
        lambda: ({"hook": row} for row in rows),
        features=features,
        cache_dir=f"{path}.cache",
        writer_batch_size=64,
        fingerprint=path.name,  # else it would try to hash the rows
    ).save_to_disk(str(path))


def _reader(path: Path, context: int, width: int, batch: int, buffer: int) -> Any:
    from sae_lens.training.activations_store import ActivationsStore

    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name="hook",
        hook_head_index=None,
        context_size=context,
        d_in=width,
        n_batches_in_buffer=buffer,
        total_training_tokens=10**9,
        store_batch_size_prompts=PROMPTS,
        train_batch_size_tokens=batch,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(path),
    )


def epoch(store: ActivationStore, hookpoint: str, path: Path, batch: int) -> Callable[[], int]:
    """Reads as many tokens as the store's training units hold, with the small buffer (the large one is slower)."""
    context = store.context
    units = store.split("train")
    width = sum(store.hookpoints[hookpoint][d] for d in ("d_in", "d_out"))

    def rows() -> Iterator[np.ndarray]:
        for unit in units:
            x, y = (store.activations(hookpoint, side, *store.unit_range(unit)) for side in ("input", "output"))
            yield from torch.cat([x, y], 1).float().numpy().reshape(-1, context, width)

    with contextlib.redirect_stderr(io.StringIO()):
        _write(rows(), context, width, path)
    tokens = sum(stop - start for start, stop in map(store.unit_range, units))

    def read() -> int:
        reader = iter(_reader(path, context, width, batch, CONTEXTS_IN_BUFFER[0]).get_data_loader())
        return sum(len(next(reader)) for _ in range(tokens // batch))

    return read


def row_batches(row_of_token: np.ndarray, context: int, path: Path, batch: int, buffer: int) -> list[np.ndarray]:
    """An epoch's batches of its buffer over a cache in which a token's only activation is the number of its row."""
    _write(iter(row_of_token.astype(np.float32).reshape(-1, context, 1)), context, 1, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = iter(_reader(path, context, 1, batch, buffer).get_data_loader())
        return [next(reader).numpy().ravel().astype(int) for _ in range(len(row_of_token) // batch)]


def cached(lm: torch.nn.Module, tokenizer: Any, hook: str, width: int, rows: np.ndarray, batch: int, path: Path) -> Any:
    """Its CacheActivationsRunner over token rows [R, T], ready to `run`: one hook's output, float32, as it writes by
    default. The model is given, since it loads none from GGUF."""
    from datasets import Dataset
    from sae_lens import cache_activations_runner
    from sae_lens.config import CacheActivationsRunnerConfig
    from sae_lens.load_model import HookedProxyLM

    cache_activations_runner.load_model = lambda **_: HookedProxyLM(lm, tokenizer, hook_names=[hook])
    cfg = CacheActivationsRunnerConfig(
        dataset_path="-",
        model_name="-",
        model_class_name="AutoModelForCausalLM",
        model_batch_size=batch,
        hook_name=hook,
        d_in=width,
        training_tokens=rows.size,
        context_size=rows.shape[1],
        new_cached_activations_path=str(path),
        shuffle=False,
        buffer_size_gb=rows.size * width * 4 / 1e9,  # it fills whole buffers
        device="cpu",
        prepend_bos=False,
        streaming=False,
    )
    return cache_activations_runner.CacheActivationsRunner(cfg, Dataset.from_dict({"tokens": rows.tolist()}))
