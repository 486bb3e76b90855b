"""Which positions of the text a reader leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.text.chat import ROLES


@dataclass(frozen=True)
class TokenFilter:
    """Which positions a reader leaves out. The store holds all of them."""

    first_positions: int = 1
    special_tokens: bool = True
    roles: tuple[str, ...] | None = None
    """Of conversations keep what these wrote (ROLES of pipeline/text/chat.py); None: all."""
    max_norm: float | None = None
    """Leave out tokens that are longer, on either side of the MLP, than so many medians ..."""
    longest: tuple[float | None, float | None] | None = None
    """... which is these lengths of an input and of an output; None of a side that is not stored."""
    long: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Where the store at hand has such tokens (outliers.py): positions, rising."""

    def __post_init__(self) -> None:
        for role in self.roles or ():
            if role not in ROLES:
                raise UserError(f"stream.roles: there is no role {role!r}; there are {', '.join(ROLES)}")

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of positions (commit.POSITIONS) that stay, for statistics: exact for first_positions 0 and 1."""
        first = ("first",) if self.first_positions == 0 else ()
        return (*first, *(() if self.special_tokens else ("special",)), "other")

    def keep(
        self,
        position_B: np.ndarray,
        token_B: np.ndarray,
        context: int,
        special: Sequence[int],
        role_B: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return bool [B], true for the positions that are kept. `role_B`: needed where `roles` is set."""
        keep = position_B % context >= self.first_positions
        if self.special_tokens and len(special) <= 8:  # mostly; np.isin takes far longer, and other readers wait for it
            for token in special:
                keep &= token_B != token
        elif self.special_tokens:
            keep &= ~np.isin(token_B, special)
        if self.roles is not None:
            assert role_B is not None
            keep &= np.isin(role_B, [ROLES.index(role) for role in self.roles])
        if self.long is not None and len(self.long):
            place = np.minimum(np.searchsorted(self.long, position_B), len(self.long) - 1)
            keep &= self.long[place] != position_B
        return keep

    def facts(self) -> dict[str, Any]:
        """Return what coder.json keeps of it."""
        found: dict[str, Any] = {"first_positions": self.first_positions, "special_tokens": self.special_tokens}
        if self.roles is not None:
            found["roles"] = list(self.roles)
        return found if self.longest is None else found | {"max_norm": self.max_norm, "longest": list(self.longest)}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "TokenFilter":
        """The inverse of `facts`."""
        kept: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
        return cls(**kept)


USUAL = TokenFilter()
"""The default of training: leaves out the first position of each row and special tokens."""
