"""The one list per step that every gradient reads: the entries of a batch of codes, sorted by latent.

Legend: L entries (token, latent) in all, M latents, S segments.
"""

from typing import NamedTuple

from torch import Tensor


class Entries(NamedTuple):
    """The L entries of a batch of codes sorted by latent; ties keep token order, so every sum over a latent's tokens
    has a fixed order."""

    entry_L: Tensor
    """Index of the entry in the codes."""
    token_L: Tensor
    """Token of the entry."""
    starts_M: Tensor
    """Where each latent's entries begin."""
    latent_S: Tensor | None = None
    """On GPUs, which cut the lists of latents into segments: the latent of each segment; M where there is none."""
    before_M: Tensor | None = None
    """How many segments lower latents have."""
    partial_before_M: Tensor | None = None
    """How many of these belong to latents with several."""
