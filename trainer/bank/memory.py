"""How much memory a coder in training takes, and which coders fit on a device together."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.cross_layer import targets
from skipcoder.trainer.coder.encoding import chunk_bytes
from skipcoder.trainer.config import Kind, OptimName, TrainConfig
from skipcoder.trainer.run.build import hookpoints
from skipcoder.trainer.step.sides import sides

GIB = 2**30
MARGIN = GIB // 2
"""Bytes for batches and what else a step needs (benchmarks/memory.py)."""


class Need(NamedTuple):
    """Bytes that one coder needs."""

    resident: int
    """Held from the first step to the last: parameters, optimiser, counts."""
    passing: int
    """Held during its own step (gradients, the encoder's weights in another precision, pre-activations) or while it is
    saved (two copies of the weights)."""


def need(cfg: TrainConfig, d_in: int, d_out: int, device: str) -> Need:
    """Return the need of one coder, or of one of its shards, float32 throughout."""
    m = cfg.coder.width // cfg.train.shards
    weights = (
        m * (d_in + d_out + 1)
        + d_out
        + (d_in * d_out if cfg.coder.kind in (Kind.skip_transcoder, Kind.skip_clt) else 0)
    )
    copies = 3 if cfg.optim.name is OptimName.adam else 2
    chunk = min(chunk_bytes(cfg.encode, device), 4 * m * cfg.train.batch_tokens)
    half = 2 * m * d_in if device.startswith("cuda") else 0  # the encoder in bfloat16
    return Need(4 * weights * copies + 8 * m + half, 8 * weights + chunk)


def refuse_too_large(cfg: TrainConfig, store: ActivationStore, budget: float, device: str) -> Need:
    """The need of one coder; UserError if the budget (bytes) does not hold it."""
    names = hookpoints(cfg, store)
    ins, outs = ([store.width(name, side) for name in names] for side in sides(cfg.coder))
    if cfg.coder.over_layers:
        to = [targets(layer, len(outs), cfg.coder.window) for layer in range(len(outs))]
        each = [need(cfg, d, sum(outs[t] for t in some), device) for d, some in zip(ins, to, strict=True)]
        rows = 12 * cfg.train.batch_tokens * sum(outs[t] for some in to for t in some)  # targets, errors, gradients
        one = Need(sum(part.resident for part in each), sum(part.passing for part in each) + rows)
    else:
        one = need(cfg, sum(ins), sum(outs), device)
    if bank_bytes([one]) > budget:
        shards = f" / train.shards={cfg.train.shards}" if cfg.train.shards > 1 else ""
        or_else = "raise train.shards to spread it over processes"
        if cfg.coder.over_layers:
            or_else = "coder.window or train.batch_tokens"
        raise UserError(
            f"coder.width={cfg.coder.width}{shards}: takes about {bank_bytes([one]) / GIB:,.1f} GiB to train, {device} "
            f"has {budget / GIB:,.1f} GiB for it; lower the width, or {or_else}"
        )
    return one


def decoders(cfg: TrainConfig, store: ActivationStore, one: Need) -> str:
    """Say what the decoders of a cross-layer transcoder take, and all of it in training."""
    names = hookpoints(cfg, store)
    to = [store.width(names[t], "output") for i in range(len(names)) for t in targets(i, len(names), cfg.coder.window)]
    held = f"{len(to)} decoder matrices, {4 * cfg.coder.width * sum(to) / GIB:,.2f} GiB"
    return f"{cfg.coder.kind}: {held}; to train, about {bank_bytes([one]) / GIB:,.1f} GiB"


def free_bytes(device: str) -> int:
    """Return the memory that new tensors on the device may use."""
    if device.startswith("cuda"):
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it out again
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil

    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def pack(needs: Sequence[Need], budget: float, devices: int = 1) -> list[list[int]]:
    """Return the coders' numbers by bank: as few banks as fit, at least one per device, about equally full.

    >>> pack([Need(4, 1), Need(4, 1), Need(4, 1)], MARGIN + 9)
    [[0, 2], [1]]
    >>> pack([Need(4, 1), Need(4, 1), Need(4, 1)], MARGIN + 100, devices=2)
    [[0, 2], [1]]
    """
    for number in range(min(devices, len(needs)), len(needs) + 1):
        banks: list[list[int]] = [[] for _ in range(number)]
        for i in range(len(needs)):  # the emptiest bank takes the next coder
            min(banks, key=lambda bank: sum(needs[j].resident for j in bank)).append(i)
        if all(bank_bytes([needs[j] for j in bank]) <= budget for bank in banks):
            break
    return banks


def bank_bytes(needs: Sequence[Need]) -> int:
    """Return the peak need of a bank, whose members step one after the other."""
    return MARGIN + sum(n.resident for n in needs) + max((n.passing for n in needs), default=0)
