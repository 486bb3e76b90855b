"""Which sides of an MLP a coder reads and writes."""

from typing import NamedTuple

from skipcoder.trainer.config import CoderConfig, Kind, Side


class Sides(NamedTuple):
    """The sides of the MLP, `input` or `output`, that a coder reads and writes."""

    read: str
    write: str


def sides(cfg: CoderConfig) -> Sides:
    """Return the sides of the MLP that a coder reads and writes."""
    if cfg.kind == Kind.sae:
        side = "input" if cfg.side is Side.input else "output"
        return Sides(side, side)
    return Sides("input", "output")
