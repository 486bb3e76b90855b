"""Where a coder comes from and where it attaches, for coder.json."""

from collections.abc import Sequence
from typing import cast

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.files import FilterFacts, Provenance, SideFacts, SiteFacts
from skipcoder.trainer.config import Kind
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.joined import OTHER, JoinedStore
from skipcoder.trainer.step.cross_layer import AnyLearner, CrossLayerLearner
from skipcoder.trainer.step.sides import OneSide, Sides


def provenance(store: ActivationStore, hookpoints: Sequence[str], kept: TokenFilter, learner: AnyLearner) -> Provenance:
    """Return where a trained coder comes from and where it attaches."""
    own = [name for name in hookpoints if not name.startswith(OTHER)]
    found = attachment(store, own[0], learner.sides, kept)
    if isinstance(learner, CrossLayerLearner):
        reads = [one.reads.sides[0] for one in learner.learners]
        writes = [one.writes.sides[0] for one in learner.learners]
        del found["read"], found["write"]
        found["read_sides"] = _sides(store, hookpoints, learner.sides.read, reads)
        found["sides"] = _sides(store, hookpoints, learner.sides.write, writes)
    elif learner.cfg.coder.kind == Kind.crosscoder:
        del found["read"], found["write"]
        found["sides"] = _sides(store, hookpoints, learner.sides.write, learner.writes.sides)
    else:
        (s_in,), (s_out,) = learner.reads.scales, learner.writes.scales
        found["scales"] = {"input": s_in, "output": s_out, "folded": True}
    if isinstance(store, JoinedStore):
        found["other_model"] = store.other.attrs["identity"]["model"]
    found["hookpoint"] = " + ".join(own)
    found["data"]["train_tokens"] = learner.tokens
    if kept.long is not None:
        found["data"]["long_tokens"] = len(kept.long)
    found["seed"] = learner.cfg.seed
    return found


def _sides(store: ActivationStore, hookpoints: Sequence[str], side: str, numbers: Sequence[OneSide]) -> list[SideFacts]:
    """Describe that side of each hookpoint."""
    return [
        {
            "hookpoint": name,
            "module": store.hookpoints[name]["read" if side == "input" else "write"],
            "side": side,
            "width": one.width,
            "scale": one.scale,
            "variance": one.variance * one.scale**2,
        }
        for name, one in zip(hookpoints, numbers, strict=True)
    ]


def attachment(store: ActivationStore, hookpoint: str, sides: Sides, kept: TokenFilter) -> Provenance:
    """Return where a coder that reads and writes these sides of a store's hookpoint attaches to its model."""
    facts = store.hookpoints[hookpoint]
    site: dict[str, SiteFacts] = {
        "input": {"module": facts["read"], "side": "input"},
        "output": {"module": facts["write"], "side": "output"},
    }
    return {
        "model": store.attrs["identity"]["model"],
        "hookpoint": hookpoint,
        "read": site[sides.read],
        "write": site[sides.write],
        "data": {
            "store_identity": store.attrs["identity_hash"],
            "source": store.attrs["data"],
            "filter": cast(FilterFacts, kept.facts()),
        },
    }
