"""Data parallel training: the processes of one `torchrun`, each with its share of every global batch.

    torchrun --nproc-per-node 8 trainer/train.py ...

Losses and counts are sums with constant denominators, so adding over the ranks gives what one process would have; the
order of the additions differs, and with it the last bits.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from skipcoder.pipeline.errors import UserError
from skipcoder.trainer.config import Activation, TrainConfig
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """The group that torchrun started; without torchrun, alone."""
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
        """Add up over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share(self, *tensors: Tensor) -> None:
        """Give all ranks the tensors of the main one, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        votes = torch.tensor(int(flag), device=device)
        dist.all_reduce(votes)
        return bool(votes)

    def check(self, cfg: TrainConfig) -> None:
        """UserError for what is defined on a whole batch."""
        if self.size > 1 and cfg.coder.activation in (Activation.batchtopk, Activation.jumprelu):
            raise UserError(
                f"coder.activation={cfg.coder.activation.value} looks at the whole batch and cannot be trained by "
                f"{self.size} processes; use one process for each bank, or topk"
            )


ALONE = Ranks()
