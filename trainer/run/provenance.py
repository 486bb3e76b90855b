"""Where a coder comes from and where it attaches, for coder.json."""

from collections.abc import Sequence
from typing import cast

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.files import FilterFacts, Provenance, ScaleFacts, SideFacts, SiteFacts
from skipcoder.trainer.config import Kind
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.joined import OTHER, JoinedStore
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.sides import Sides


def provenance(store: ActivationStore, hookpoints: Sequence[str], kept: TokenFilter, learner: Learner) -> Provenance:
    """Return where a trained coder comes from and where it attaches."""
    if learner.cfg.coder.kind == Kind.crosscoder:
        found = _several(store, hookpoints, kept, learner)
    else:
        (hookpoint,), ((s_in,), (s_out,)) = hookpoints, (learner.reads.scales, learner.writes.scales)
        scales: ScaleFacts = {"input": s_in, "output": s_out, "folded": True}
        found = {**attachment(store, hookpoint, learner.sides, kept), "scales": scales}
    data = found.pop("data")
    data["train_tokens"] = learner.tokens
    if kept.long is not None:
        data["long_tokens"] = len(kept.long)
    return {**found, "data": data, "seed": learner.cfg.seed}


def _several(store: ActivationStore, hookpoints: Sequence[str], kept: TokenFilter, learner: Learner) -> Provenance:
    """Return where a coder over several hookpoints attaches."""
    sites = [attachment(store, name, learner.sides, kept)["write"] for name in hookpoints]
    row = learner.writes
    each: list[SideFacts] = [
        {"hookpoint": name, **site, "width": width, "scale": scale, "variance": variance * scale**2}
        for name, site, width, scale, variance in zip(
            hookpoints, sites, row.widths, row.scales, row.variances, strict=True
        )
    ]
    own = [name for name in hookpoints if not name.startswith(OTHER)]
    first = attachment(store, own[0], learner.sides, kept)
    found: Provenance = {"model": first["model"], "hookpoint": " + ".join(own), "sides": each, "data": first["data"]}
    if isinstance(store, JoinedStore):
        found["other_model"] = store.other.attrs["identity"]["model"]
    return found


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
