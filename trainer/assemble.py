"""What a run is built from: the device, the store, a learner that starts from the store's statistics."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer.config import Kind, SkipInit, TrainConfig
from skipcoder.trainer.learner import Learner, sides
from skipcoder.trainer.ranks import ALONE, Ranks
from skipcoder.trainer.skip_init import TOKENS_PER_DIMENSION, ridge
from skipcoder.trainer.stream import ActivationStream, TokenFilter


def open_store(cfg: TrainConfig) -> ActivationStore:
    """The complete store that the configuration means; its path is written into the configuration."""
    cfg.store.path = store_path(cfg.store.path)
    store = ActivationStore.open(cfg.store.path)
    if not store.is_complete:
        raise UserError(
            f"{store.place} has only {len(store.units)} of its units; finish it: run the same capture command again"
        )
    return store


def token_filter(cfg: TrainConfig) -> TokenFilter:
    """The positions that training leaves out."""
    return TokenFilter(cfg.stream.first_positions, cfg.stream.special_tokens)


def make_stream(cfg: TrainConfig, store: ActivationStore, device: str, ranks: Ranks = ALONE) -> ActivationStream:
    """The configured stream of training tokens."""
    return ActivationStream(
        store,
        store.hookpoint(cfg.hookpoint),
        cfg.train.batch_tokens,
        seed=cfg.stream.seed,
        filter=token_filter(cfg),
        rank=ranks.rank,
        world_size=ranks.size,
        pool_chunks=cfg.stream.pool_chunks,
        device=device,
    )


def make_learner(
    cfg: TrainConfig,
    store: ActivationStore,
    hookpoint: str,
    steps: int,
    device: str,
    fresh: bool = True,
    ranks: Ranks = ALONE,
) -> Learner:
    """A learner; a `fresh` one starts from the statistics of the store's training units."""
    kept = token_filter(cfg)
    x, y = (store.moments(hookpoint, side, positions=kept.classes) for side in sides(cfg.coder))
    learner = Learner(cfg, x, y, steps, device, ranks)
    if fresh and cfg.coder.kind == Kind.skip_transcoder and _starts_from_ridge(cfg, x.count, len(x.mean)):
        if ranks.is_main:
            learner.start_skip(*ridge(store, hookpoint, kept))
        assert learner.coder.W_skip is not None
        ranks.share(learner.coder.W_skip.data, learner.coder.b_dec.data)
    return learner


def _starts_from_ridge(cfg: TrainConfig, tokens: int, d_in: int) -> bool:
    if cfg.coder.skip_init is not None:
        return cfg.coder.skip_init is SkipInit.ridge
    if tokens < TOKENS_PER_DIMENSION * d_in:
        wanted = TOKENS_PER_DIMENSION * d_in
        print(f"the skip starts from zero: ridge would need {wanted:,} training tokens, not {tokens:,}")
        return False
    return True


def pick_device(asked: str | None, key: str = "train.device") -> str:
    """The asked device, if it is there; without a wish, cuda before cpu."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{key}={asked}, but torch sees no GPU here; use cpu, or leave it null")
    try:
        return str(torch.empty(0, device=asked).device)
    except RuntimeError as error:
        raise UserError(f"{key}={asked}: {str(error).splitlines()[0]}") from None


def provenance(store: ActivationStore, hookpoint: str, learner: Learner) -> dict[str, Any]:
    """Where a coder came from and where it attaches, for coder.json."""
    meta = attachment(store, hookpoint, learner.sides, token_filter(learner.cfg))
    scales = {"input": learner.scales.s_in, "output": learner.scales.s_out, "folded": True}
    data = meta.pop("data") | {"train_tokens": learner.tokens}
    return {**meta, "scales": scales, "data": data, "seed": learner.cfg.seed}


def attachment(store: ActivationStore, hookpoint: str, sides: tuple[str, str], kept: TokenFilter) -> dict[str, Any]:
    """Where a coder that reads and writes these sides of a store's hookpoint attaches to its model."""
    facts = store.hookpoints[hookpoint]
    site = {
        "input": {"module": facts["read"], "side": "input"},
        "output": {"module": facts["write"], "side": "output"},
    }
    read, write = sides
    return {
        "model": store.attrs["identity"]["model"],
        "hookpoint": hookpoint,
        "read": site[read],
        "write": site[write],
        "data": {
            "store_identity": store.attrs["identity_hash"],
            "source": store.attrs["data"],
            "filter": asdict(kept),
        },
    }


def store_path(asked: str | None) -> str:
    """The asked store; without a wish the only one under stores/."""
    if asked is not None:
        return asked
    found = sorted(Path("stores").glob("*.zarr"))
    if len(found) == 1:
        return str(found[0])
    have = f"stores/ holds {', '.join(p.name for p in found)}" if found else "there is none under stores/"
    raise UserError(f"store.path is not set and {have}; set it, or capture with: python pipeline/cache.py")
