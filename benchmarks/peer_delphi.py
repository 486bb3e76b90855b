"""What interpret.py times, by eai-delphi's own classes, on the same activations. For delphi see test_delphi.py.

    PYTHONPATH=DIR python benchmarks/peer_delphi.py --run DIR [--latents 1000]

delphi runs the language model to fill its cache. Here the store's activations take the model's place: the same coder
encodes them, a batch's latents are written out densely, as delphi's hooks hand them over, and `InMemoryCache` and
`save_splits` do the rest. Then its `LatentDataset` makes its own default number of examples of 32 tokens.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentCache, LatentDataset
from interpret import peak

from skipcoder.pipeline.model.load import load_tokenizer
from skipcoder.pipeline.store.attrs import model_config
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import Run


def fill(cache: LatentCache, run: Run, store: ActivationStore) -> float:
    """All units through `cache`; seconds that encoding took."""
    encoding = 0.0
    coder, name, side = run.coder, run.coder.meta["hookpoint"], run.read_site.side
    for unit in store.units:
        start, stop = store.unit_range(unit)
        begun = time.perf_counter()
        x_ND = store.activations(name, side, start, stop)
        index = torch.from_numpy(store.read("index", start, stop).astype(np.int64) - start)
        with torch.no_grad():
            found = [coder(part)[1:] for part in x_ND.split(4096)]
        values, indices = (torch.cat(column) for column in zip(*found, strict=True))
        encoding += time.perf_counter() - begun
        dense_NM = torch.zeros(stop - start, coder.cfg.width)
        dense_NM[index[:, None], indices] = values
        tokens_BT = torch.from_numpy(store.tokens(unit))
        cache.cache.add(dense_NM.view(*tokens_BT.shape, -1), tokens_BT, unit, name)
    return encoding


async def read(dataset: LatentDataset) -> int:
    """Latents that it has examples of."""
    return len([record async for record in dataset])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--latents", type=int, default=1000)
    args = parser.parse_args()
    run = Run.open(args.run)
    store = ActivationStore.open(run.store_path)
    name = run.coder.meta["hookpoint"]
    found: dict[str, float] = {"peak MB before": peak()}
    cache = LatentCache(None, {name: None}, batch_size=store.unit_rows)
    cache.width = run.coder.cfg.width
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        found["of which encoding s"] = fill(cache, run, store)
        cache.cache.save()
        cache.save_splits(5, Path(folder))
        found["cache s"] = time.perf_counter() - begun
        found["cache MB"] = sum(file.stat().st_size for file in (Path(folder) / name).iterdir()) / 1e6
        found["peak MB after cache"] = peak()
        config = {"dataset_repo": "", "dataset_split": "", "dataset_name": "", "dataset_column": "text"}
        (Path(folder) / name / "config.json").write_text(
            json.dumps(
                {**config, "batch_size": 1, "cache_ctx_len": store.context, "n_tokens": store.rows * store.context}
            )
        )
        alive = torch.unique(cache.cache.latent_locations[name][:, 2])[: args.latents]
        del cache
        begun = time.perf_counter()
        dataset = LatentDataset(
            folder, SamplerConfig(), ConstructorConfig(), load_tokenizer(model_config(store.attrs)),
            modules=[name], latents={name: alive},
        )  # fmt: skip
        found["with enough examples"] = asyncio.run(read(dataset))
        found["examples s"] = time.perf_counter() - begun
        found["peak MB after examples"] = peak()
    for key, value in found.items():
        print(f"{key:26} {value:,.1f}")


if __name__ == "__main__":
    main()
