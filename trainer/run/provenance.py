"""Where a coder comes from and where it attaches, for coder.json."""

from typing import cast

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.files import FilterFacts, Provenance, ScaleFacts, SiteFacts
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.sides import Sides


def provenance(store: ActivationStore, hookpoint: str, kept: TokenFilter, learner: Learner) -> Provenance:
    """Return where a trained coder comes from and where it attaches."""
    found = attachment(store, hookpoint, learner.sides, kept)
    data = found.pop("data")
    data["train_tokens"] = learner.tokens
    if kept.long is not None:
        data["long_tokens"] = len(kept.long)
    scales: ScaleFacts = {"input": learner.scales.s_in, "output": learner.scales.s_out, "folded": True}
    return {**found, "scales": scales, "data": data, "seed": learner.cfg.seed}


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
