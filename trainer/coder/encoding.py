"""Which precision finds the latents in training, and whether it finds the right ones.

Legend: N tokens, K active latents, D input width.
"""

import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.kernels.preactivations import Search, fp8_type
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import EncodeConfig

SAMPLE = 64
"""Tokens on which recall is measured."""

CHUNK_CPU, CHUNK_GPU = 2**26, 2**31

FP8_WIDTH = 2**15
"""Latents from which two passes over the weights, into 8 bits, pay."""

_MORE_EXACT = {"scout": "bfloat16", "fp8": "bfloat16", "bfloat16": "float32"}


def make_search(cfg: EncodeConfig, mean_D: Tensor, variance_D: Tensor, device: str, width: int) -> Search:
    """Return how a run searches for `width` latents that reads inputs with these moments."""
    # Scaling by the root of each dimension's standard deviation halves, on a log scale, the differences between
    # dimensions in the inputs and, inversely, in the weights.
    spread = (variance_D**0.25).float()
    spread = (spread / spread.mean()).clamp_min(1e-3)
    mode = cfg.mode.value if cfg.mode else fastest_mode(device, width)
    if not available(mode, device):
        raise UserError(f"encode.mode={mode} is not for this device, {device}; leave it null, or use bfloat16")
    return Search(mode, cfg.nominated, chunk_bytes(cfg, device), mean_D.float().to(device), spread.to(device))


def available(mode: str, device: str) -> bool:
    """Return whether a device has a mode: int8 does not pay on GPUs, fp8 needs sm_89 or an MI300."""
    if device == "cpu":
        return True
    return mode != "scout" and (mode != "fp8" or fp8_type(torch.device(device)) is not None)


def chunk_bytes(cfg: EncodeConfig, device: str) -> int:
    """Return the bytes of pre-activations that may be held at once. Each chunk reads all of W_enc again: on an H200 a
    step of 131,072 latents took 45.6 ms with chunks of 2^24 elements, 21.5 ms with 2^30. What is free is not asked, as
    the last bits of a product may depend on the size of its chunks."""
    return cfg.chunk_bytes or (CHUNK_CPU if device == "cpu" else CHUNK_GPU)


def fastest_mode(device: str, width: int) -> str:
    """Return the mode that benchmarks/train_step.py found fastest with this CPU's instructions, or
    benchmarks/gpu_check.py on GPUs with fp8 (0.82 to 0.95 of bfloat16's time from 32,768 latents on)."""
    if device.startswith("cuda"):
        return "fp8" if width >= FP8_WIDTH and available("fp8", device) else "bfloat16"
    has = torch.cpu.get_capabilities()
    if has.get("avx512_vnni"):
        return "scout"
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


@torch.no_grad()
def recall(coder: SparseCoder, x_ND: Tensor, tokens: int = SAMPLE) -> float:
    """Return the share of the latents chosen in float32 (those with values above 0) that the coder's search chooses,
    on the first tokens of a batch; 1 if there are none."""
    x_ND = x_ND[:tokens]
    search = coder.search
    chosen = coder.encode(x_ND)
    coder.search = search._replace(mode="float32")
    exact = coder.encode(x_ND)
    coder.search = search
    wanted, had = (c.token * coder.cfg.width + c.indices for c in (exact, chosen))
    positive = exact.values > 0
    counts = torch.stack([torch.isin(wanted, had)[positive].sum(), positive.sum()])
    if coder.shard is not None:
        coder.shard.group.sum(counts)
    found, of = counts.tolist()
    return found / of if of else 1.0


def more_exact(search: Search) -> Search:
    """Return the search to fall back to."""
    return search._replace(mode=_MORE_EXACT[search.mode])
