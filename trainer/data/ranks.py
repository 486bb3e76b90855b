"""Data-parallel training: the processes of one `torchrun`, each with its share of every global batch.

    torchrun --nproc-per-node 8 trainer/train.py ...

Losses and counts are sums with constant denominators, so adding them over the ranks gives the result of one process;
only the order of the additions differs, and thus the last bits.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among `size`; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Join the group that torchrun started; without torchrun, be alone."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Sum tensors over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share(self, *tensors: Tensor) -> None:
        """Copy the main rank's tensors to all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def total(self, n: int) -> int:
        """Return the sum of `n` over the ranks."""
        found = torch.tensor(n, device=self._device)
        self.sum(found)
        return int(found)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, one rank after another; their numbers may differ."""
        if self.size == 1:
            return rows
        lengths = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
        padded = rows.new_zeros(max(map(int, lengths)), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])

    @property
    def _device(self) -> str:
        return "cuda" if self.size > 1 and dist.get_backend() == "nccl" else "cpu"

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.size == 1:
            return flag
        return self.total(int(flag)) > 0


ALONE = Ranks()
