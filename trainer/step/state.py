"""All that a step depends on, as a checkpoint keeps it; of a coder in several processes, each keeps its own part."""

from collections.abc import Callable, Sequence
from typing import Any, NotRequired

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor
from typing_extensions import TypedDict

from skipcoder.trainer.coder.shard import EVERYWHERE


@with_config(ConfigDict(arbitrary_types_allowed=True))
class LearnerState(TypedDict):
    """The state of a learner."""

    coder: dict[str, Tensor]
    optimiser: list[dict[str, Any]]
    since_fired: Tensor
    density: Tensor
    encode_mode: str
    chunk_bytes: NotRequired[int]
    recall: float
    has_dead: NotRequired[bool]
    step: int
    tokens: int
    layers: NotRequired[list[Any]]
    """Of a cross-layer transcoder the states of the layers after the first."""


def take_latents(parts: Sequence[tuple[range, LearnerState]], wanted: range) -> LearnerState:
    """Return the state of the `wanted` latents, found in the states of other runs of latents."""
    first = parts[0][1]
    names = list(first["coder"])  # the optimiser numbers parameters in this order

    def join(pick: Callable[[LearnerState], Tensor], name: str = "") -> Tensor:
        if name in EVERYWHERE or not pick(first).dim():
            return pick(first).clone()
        cuts = [slice(max(wanted.start - held.start, 0), max(wanted.stop - held.start, 0)) for held, _ in parts]
        return torch.cat([pick(part)[cut] for cut, (_, part) in zip(cuts, parts, strict=True)])

    def moments(i: int, number: int) -> dict[str, Tensor]:
        def moment(key: str) -> Tensor:
            return join(lambda part: part["optimiser"][i]["state"][number][key], names[number])

        return {key: moment(key) for key in first["optimiser"][i]["state"][number]}

    joined: LearnerState = {**first}
    joined["coder"] = {name: join(lambda part, name=name: part["coder"][name], name) for name in names}  # type: ignore[misc]
    joined["optimiser"] = [
        {**optimiser, "state": {number: moments(i, number) for number in optimiser["state"]}}
        for i, optimiser in enumerate(first["optimiser"])
    ]
    joined["since_fired"] = join(lambda part: part["since_fired"])
    joined["density"] = join(lambda part: part["density"])
    return joined
