"""The latents of a coder that one of several processes holds, and what the processes exchange.

Each finds its own candidates; the numbers that decide, N k of each process, are exchanged, and then each knows which of
its own were chosen. Choices are those of one process: of equal values, the lowest latent. Encoder and decoder rows stay
where they are; of reconstructions only the sums [N, E] travel. `b_dec` and `W_skip` are held, and moved alike, by all.

Legend: N tokens, K latents chosen per token, M latents of the whole coder, L entries, R processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from skipcoder.kernels.candidates import largest
from skipcoder.kernels.select import Chosen
from skipcoder.trainer.data.ranks import Group

EVERYWHERE = ("b_dec", "W_skip")
"""Parameters that every process holds whole. All others have one row for each latent."""


@dataclass(frozen=True)
class Shard:
    """Equal runs of a coder's `width` latents, one for each process of a group, in order."""

    group: Group
    width: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shard":
        return self

    @property
    def rows(self) -> range:
        """The latents that are here."""
        size = self.width // self.group.size
        return range(self.group.rank * size, (self.group.rank + 1) * size)

    def topk(self, mine: Chosen, k: int) -> Chosen:
        """From the k largest of each process, descending, those among the k largest of all; see kernels' Peers."""
        values_NK = mine.values.new_full((len(mine.values), k), -torch.inf)
        values_NK[:, : mine.values.shape[1]] = mine.values
        place_NK = torch.arange(k, device=values_NK.device).repeat(len(values_NK), 1)
        rising_NK = -values_NK
        for rank, theirs_NK in enumerate(self.group.stack(rising_NK)):  # latents of earlier processes come first
            if rank != self.group.rank:
                place_NK += torch.searchsorted(theirs_NK, rising_NK, right=rank < self.group.rank)
        chosen_NK = place_NK[:, : mine.values.shape[1]] < k
        counts_N = chosen_NK.sum(1)
        place_L = place_NK[:, : mine.values.shape[1]][chosen_NK]
        return Chosen(mine.values[chosen_NK], mine.indices[chosen_NK], counts_N.cumsum(0) - counts_N, place_L)

    def batchtopk(self, mine: Chosen, k: int) -> Chosen:
        """From the N k largest of each process's batch those among the N k largest of all; see kernels' Peers."""
        assert mine.offsets is not None
        n, device = len(mine.offsets), mine.values.device
        token_L = torch.searchsorted(mine.offsets, torch.arange(len(mine.values), device=device), right=True) - 1
        flat_L = token_L * self.width + self.rows.start + mine.indices
        lengths = self.group.stack(torch.tensor(len(flat_L), device=device)).tolist()
        values, order = self.group.gather(mine.values), self.group.gather(flat_L).argsort()
        taken = torch.zeros(len(values), dtype=torch.bool, device=device)
        taken[order[largest(values[order], n * k)]] = True
        before = sum(lengths[: self.group.rank])
        here_L = taken[before : before + len(flat_L)]
        offsets_N = torch.searchsorted(token_L[here_L], torch.arange(n, device=device))
        return Chosen(mine.values[here_L], mine.indices[here_L], offsets_N)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the processes, the same bits in all."""
        return self.group.sum_in_order(partial)

    def read(self, everywhere: Tensor) -> Tensor:
        """A tensor that all hold, for use in each one's own latents: its gradient is the sum of theirs."""
        result: Tensor = _Read.apply(everywhere, self)  # type: ignore[no-untyped-call]
        return result


class _Read(Function):
    @staticmethod
    def forward(ctx: Any, everywhere: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return everywhere.view_as(everywhere)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.sum(grad), None


def uniform_rows(rows: range, d: int, bound: float, seed: int) -> Tensor:
    """[rows, D] from +-bound: these rows of a matrix that is the same however many of them are made."""
    generator, done, made = torch.Generator().manual_seed(seed), 0, torch.empty(len(rows), d)
    while done < rows.stop:
        upto = min(done + 4096, rows.start if done < rows.start else rows.stop)
        block = torch.rand(upto - done, d, generator=generator)
        if done >= rows.start:
            made[done - rows.start : upto - rows.start] = block
        done = upto
    return made.mul_(2 * bound).sub_(bound)
