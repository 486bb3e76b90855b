"""Which positions of the text a reader leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenFilter:
    """Which positions a reader leaves out. The store holds all of them."""

    first_positions: int = 1
    special_tokens: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of positions (commit.POSITIONS) that stay, for statistics: exact for first_positions 0 and 1."""
        first = ("first",) if self.first_positions == 0 else ()
        return (*first, *(() if self.special_tokens else ("special",)), "other")

    def keep(self, position_B: np.ndarray, token_B: np.ndarray, context: int, special: Sequence[int]) -> np.ndarray:
        """Return bool [B], true for the positions that are kept."""
        keep = position_B % context >= self.first_positions
        if self.special_tokens and len(special) <= 8:  # mostly; np.isin takes far longer, and other readers wait for it
            for token in special:
                keep &= token_B != token
        elif self.special_tokens:
            keep &= ~np.isin(token_B, special)
        return keep


USUAL = TokenFilter()
"""The default of training: leaves out the first position of each row and special tokens."""
