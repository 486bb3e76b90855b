"""Training by several processes: those of one `torchrun`, or of one task of a sweep on Ray.

    torchrun --nproc-per-node 8 trainer/train.py train.shards=4 ...

The processes form a mesh, data x latents: here 2 x 4. The four of a row hold a quarter of the latents each and read the
same tokens; the two of a column hold the same latents, and each reads half of every batch. With one shard, the default,
every process holds the whole coder.

Losses and counts are sums with constant denominators, so adding them over the processes gives the result of one; only
the order of the additions differs, and thus the last bits.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from skipcoder.errors import UserError
from skipcoder.trainer.data.turns import give_way

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: the first alone may read the whole store (skip_init)."""


class OtherProcessError(UserError):
    """Something failed in another process."""


def backend() -> str:
    """Return what carries tensors between processes."""
    return "nccl" if torch.cuda.is_available() else "gloo"


@dataclass(frozen=True)
class Group:
    """Processes that exchange tensors; one alone by default. All of them call the same methods in the same order."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None
    """None: all processes."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Sum tensors over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.handle)

    def least(self, tensor: Tensor) -> Tensor:
        """Return the smallest of the processes' values of a tensor, element by element."""
        found = tensor.clone()
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self.handle)
        return found

    def share(self, *tensors: Tensor) -> None:
        """Copy the first process's tensors to all, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, group=self.handle, group_src=0)

    def told(self, value: T) -> T:
        """Return the first process's value."""
        found = [value]
        if self.size > 1:
            dist.broadcast_object_list(found, group=self.handle, group_src=0)
        return found[0]

    def total(self, n: int) -> int:
        """Return the sum of `n` over the processes."""
        found = torch.tensor(n, device=self._device)
        self.sum(found)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return self.total(int(flag)) > 0 if self.size > 1 else flag

    def stack(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, which have one shape, stacked."""
        if self.size == 1:
            return tensor[None]
        found = tensor.new_empty(self.size, *tensor.shape)
        self._wait(dist.all_gather(list(found.unbind()), tensor.contiguous(), group=self.handle, async_op=True))
        return found

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one process after another; their numbers may differ."""
        if self.size == 1:
            return rows
        lengths = self.stack(torch.tensor(len(rows), device=rows.device)).tolist()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:n] for part, n in zip(self.stack(padded), lengths, strict=True)])

    def sum_in_order(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, added in the order of their ranks: the same bits in all of them, whatever
        the network. Sends what a ring would, 2 (size - 1) / size of the tensor."""
        if self.size == 1:
            return tensor
        flat = tensor.flatten()
        piece = -(-len(flat) // self.size)
        mine = flat.new_zeros(self.size * piece)
        mine[: len(flat)] = flat
        theirs = torch.empty_like(mine)
        self._wait(dist.all_to_all_single(theirs, mine, group=self.handle, async_op=True))
        pieces = theirs.view(self.size, piece)
        added = pieces[0]
        for other in pieces[1:]:
            added = added + other
        return self.stack(added).flatten()[: len(flat)].view(tensor.shape)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If what is within fails in any process, let it fail in all, so that none waits for one that has gone on."""
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise OtherProcessError("another of the run's processes failed; its message says why")

    @staticmethod
    def _wait(work: dist.Work | None) -> None:
        """Let another micro-batch compute, then wait for an exchange that has begun."""
        assert work is not None
        give_way()
        work.wait()

    @property
    def _device(self) -> str:
        return "cuda" if self.size > 1 and dist.get_backend(self.handle) == "nccl" else "cpu"


@dataclass(frozen=True)
class Ranks(Group):
    """All processes of a run, and their mesh."""

    sharded: tuple[Group, Group] | None = None

    @classmethod
    def join(cls, shards: int = 1) -> "Ranks":
        """Join the processes that torchrun started; without torchrun, be alone. UserError if they do not divide into
        rows of `shards`."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size % shards:
            raise UserError(
                f"train.shards={shards} needs a multiple of {shards} processes, here are {size}: start them with "
                f"torchrun --nproc-per-node {shards} trainer/train.py ..., or as a sweep (-m), which starts them itself"
            )
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            dist.init_process_group(backend(), timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), None, _mesh(shards) if shards > 1 else None)

    @property
    def data(self) -> Group:
        """Those that hold the same latents as this process; each reads other tokens."""
        return self.sharded[0] if self.sharded else self

    @property
    def latents(self) -> Group:
        """Those that read the same tokens as this process; each holds other latents."""
        return self.sharded[1] if self.sharded else Group()


ALONE = Ranks()


@cache
def _mesh(shards: int) -> tuple[Group, Group]:
    """Return this process's column and row of the mesh."""
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shape = dist.get_world_size() // shards, shards
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "latents"))
    data, latents = (
        Group(mesh.get_local_rank(name), size, mesh.get_group(name))
        for name, size in zip(("data", "latents"), shape, strict=True)
    )
    return data, latents
