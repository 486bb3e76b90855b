"""Build what a run needs: the store, the stream, and a learner that starts from the store's statistics."""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from skipcoder.errors import UserError
from skipcoder.pipeline.model.hookpoints import matching
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.activations import ACTIVATIONS
from skipcoder.trainer.coder.coder import KINDS
from skipcoder.trainer.config import Kind, SkipInit, TrainConfig
from skipcoder.trainer.data.batch import Column
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.joined import OTHER, JoinedStore, open_stores
from skipcoder.trainer.data.outliers import limited, moments
from skipcoder.trainer.data.ranks import ALONE, Ranks
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.step.cross_layer import AnyLearner, CrossLayerLearner
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.sides import sides
from skipcoder.trainer.step.skip_init import TOKENS_PER_DIMENSION, ridge, start_skip


def check(cfg: TrainConfig, ranks: int = 1) -> None:
    """Raise UserError for a kind or activation that is unknown or cannot do what the configuration asks of it."""
    KINDS[cfg.coder.kind]
    activation = ACTIVATIONS[cfg.coder.activation]
    activation.check(cfg.coder)
    activation.check_training(cfg, ranks)
    if cfg.store.other is not None and cfg.coder.kind != Kind.crosscoder:
        raise UserError(f"store.other is for coder.kind=crosscoder, not {cfg.coder.kind}: leave it out")
    if cfg.coder.over_hookpoints and cfg.stream.max_norm is not None:
        raise UserError(f"stream.max_norm is for coders of one hookpoint, not for a {cfg.coder.kind}: leave it null")
    if cfg.coder.over_layers:
        asked = {"coder.prefixes": cfg.coder.prefixes, "loss.multi_topk": cfg.loss.multi_topk}
        for key in (key for key, value in asked.items() if value):
            raise UserError(f"{key} is not for a {cfg.coder.kind}: leave it out")
        if ranks > 1 or cfg.train.shards > 1:
            raise UserError(f"a {cfg.coder.kind} trains in one process: leave out torchrun and train.shards")
    shards = cfg.train.shards
    if shards > 1 and cfg.coder.kind not in set(Kind):
        raise UserError(f"train.shards is for the built-in kinds of coder, not coder.kind={cfg.coder.kind}")


def open_store(cfg: TrainConfig) -> ActivationStore:
    """Open the configured store, or both as one, which must be complete; write its path into the configuration."""
    cfg.store.path = store_path(cfg.store.path)
    store = open_stores(cfg.store.path, cfg.store.other)
    for one in [store.first, store.other] if isinstance(store, JoinedStore) else [store]:
        if not one.is_complete:
            raise UserError(
                f"{one.place} has only {len(one.units)} of its units; finish it: run the same capture command again"
            )
    return store


def hookpoints(cfg: TrainConfig, store: ActivationStore) -> list[str]:
    """Return the hookpoints of a coder: one or, of a coder over several, all that match, then those of the second
    store. UserError where the store lacks them, or where they cannot go together."""
    own = store.first if isinstance(store, JoinedStore) else store
    only = cfg.hookpoint is None and len(own.hookpoints) == 1
    if not cfg.coder.over_hookpoints or cfg.hookpoint in own.hookpoints or only:
        found = [own.hookpoint(cfg.hookpoint)]
    else:
        found = matching(cfg.hookpoint or "", list(own.hookpoints))
        if not found:
            what = "is not set" if cfg.hookpoint is None else f"{cfg.hookpoint!r} matches none"
            raise UserError(f"hookpoint {what}: {own.place} holds {', '.join(own.hookpoints)}; name some with a glob")
    if cfg.coder.over_layers:
        _refuse_no_layers(cfg, own, found)
    if isinstance(store, JoinedStore):
        found += [OTHER + store.other.hookpoint(name) for name in found]
    return found


def _refuse_no_layers(cfg: TrainConfig, store: ActivationStore, names: Sequence[str]) -> None:
    """Raise UserError unless these are one hookpoint of each of several layers, in order and equally wide, and the
    window ends among them."""
    numbers = [re.findall(r"\d+", name) for name in names]
    if not all(numbers) or any(int(a[0]) >= int(b[0]) for a, b in pairwise(numbers)):
        raise UserError(
            f"hookpoint={cfg.hookpoint}: a {cfg.coder.kind} needs one of each layer, not {', '.join(names)}"
        )
    if len({(store.width(name, "input"), store.width(name, "output")) for name in names}) > 1:
        raise UserError(f"hookpoint={cfg.hookpoint}: the layers of a {cfg.coder.kind} must be equally wide")
    window = cfg.coder.window
    if window is not None and window >= len(names):
        raise UserError(f"coder.window={window}: of {len(names)} layers none is so far on; at most {len(names) - 1}")


def token_filter(cfg: TrainConfig, store: ActivationStore) -> TokenFilter:
    """Return the filter of the positions that training leaves out."""
    roles = None if cfg.stream.roles is None else tuple(cfg.stream.roles)
    kept = TokenFilter(cfg.stream.first_positions, cfg.stream.special_tokens, roles)
    most = cfg.stream.max_norm
    return kept if most is None else limited(kept, most, store, store.hookpoint(cfg.hookpoint))


def used(cfg: TrainConfig, names: Sequence[str]) -> list[Column]:
    """Return the sides that a coder reads or writes of its hookpoints."""
    return [Column(name, side) for name in names for side in dict.fromkeys(sides(cfg.coder))]


def make_stream(
    cfg: TrainConfig,
    store: ActivationStore,
    device: str,
    ranks: Ranks = ALONE,
    names: Sequence[str] = (),
    columns: Collection[Column] | None = None,
) -> ActivationStream:
    """Make the configured stream of training tokens, of hookpoints by other `names` if those are given."""
    return ActivationStream(
        store,
        names or hookpoints(cfg, store),
        cfg.train.batch_tokens,
        seed=cfg.stream.seed,
        filter=token_filter(cfg, store),
        rank=ranks.data.rank,
        world_size=ranks.data.size,
        pool_chunks=cfg.stream.pool_chunks,
        readers=cfg.stream.readers,
        device=device,
        columns=columns,
    )


def any_learner(
    cfg: TrainConfig,
    store: ActivationStore,
    hookpoint: str | Sequence[str],
    steps: int,
    device: str,
    fresh: bool = True,
    ranks: Ranks = ALONE,
) -> AnyLearner:
    """Make a learner; a `fresh` one starts from the statistics of the store's training units."""
    names = [hookpoint] if isinstance(hookpoint, str) else list(hookpoint)
    with ranks.together():
        kept = token_filter(cfg, store)
        x, y = ([moments(store, name, side, kept) for name in names] for side in sides(cfg.coder))
        learner: AnyLearner
        if cfg.coder.over_layers:
            learner = CrossLayerLearner(cfg, x, y, steps, device)
        else:
            learner = Learner(cfg, x, y, steps, device, ranks, in_bfloat16=True)  # as all codecs decode
    if fresh and cfg.coder.has_skip and _starts_from_ridge(cfg, x[0].count, len(x[0].mean), ranks):
        each = learner.learners if isinstance(learner, CrossLayerLearner) else [learner]
        for name, one in zip(names, each, strict=True):
            with ranks.together():
                if ranks.is_main:
                    start_skip(one, *ridge(store, name, kept, device))
            assert one.coder.W_skip is not None
            ranks.share(one.coder.W_skip.data, one.coder.b_dec.data)
    return learner


def _starts_from_ridge(cfg: TrainConfig, tokens: int, d_in: int, ranks: Ranks) -> bool:
    if cfg.coder.skip_init is not None:
        return cfg.coder.skip_init is SkipInit.ridge
    if tokens < TOKENS_PER_DIMENSION * d_in:
        wanted = TOKENS_PER_DIMENSION * d_in
        if ranks.is_main:
            print(f"the skip starts from zero: ridge would need {wanted:,} training tokens, not {tokens:,}")
        return False
    return True


def store_path(asked: str | None) -> str:
    """Return the path asked for or, if none, that of the only store under stores/."""
    if asked is not None:
        return asked
    found = sorted(Path("stores").glob("*.zarr"))
    if len(found) == 1:
        return str(found[0])
    have = f"stores/ holds {', '.join(p.name for p in found)}" if found else "there is none under stores/"
    raise UserError(f"store.path is not set and {have}; set it, or capture with: python pipeline/cache.py")


def make_learner(
    cfg: TrainConfig,
    store: ActivationStore,
    hookpoint: str | Sequence[str],
    steps: int,
    device: str,
    fresh: bool = True,
    ranks: Ranks = ALONE,
) -> Learner:
    """As `any_learner`, of a coder that is no cross-layer transcoder."""
    learner = any_learner(cfg, store, hookpoint, steps, device, fresh, ranks)
    assert isinstance(learner, Learner)
    return learner
