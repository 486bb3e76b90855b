"""Whole training steps on one set of random pairs, ours and others', for gpu_check.py.

Each function returns a step: a function that makes one, without waiting for the device. All train a transcoder with
Adam, clip gradients and keep count of dead latents.
"""

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from shapes import Shape
from torch import Tensor, nn

from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.config import CoderConfig, EncodeConfig, Kind, LoopConfig, TrainConfig
from skipcoder.trainer.step.learner import Learner

Step = Callable[[], object]
RATE = 1e-4


class Pairs:
    """Activation pairs of one shape, y a simple function of x."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        g = torch.Generator(device).manual_seed(1)
        # bfloat16 holds the inputs, as it does those from a store; a copy that our kernels read takes half the bytes.
        self.x = torch.randn(shape.n, shape.d, generator=g, device=device).bfloat16().float()
        mixing = torch.randn(shape.d, shape.d, generator=g, device=device) / shape.d**0.5
        self.y = torch.relu(self.x @ mixing)
        self.moments = Moments.of(self.x.cpu()), Moments.of(self.y.cpu())


def learner(pairs: Pairs, *, steps: int = 10_000, loss: Any = None, encode: Any = None, **coder: Any) -> Learner:
    """Our learner; `coder`: options of CoderConfig besides k and width."""
    n, _, m, k = pairs.shape
    cfg = TrainConfig(
        coder=CoderConfig(**{"kind": Kind.transcoder, "k": k, "width": m, **coder}),
        train=LoopConfig(tokens=steps * n, batch_tokens=n, log_every=10**9, dead_tokens=10 * n),
        encode=encode or EncodeConfig(),
        **({"loss": loss} if loss else {}),
    )
    return Learner(cfg, *pairs.moments, steps, pairs.device, in_bfloat16=True)


def ours(pairs: Pairs, one: Learner) -> Step:
    """A step of a learner."""
    return lambda: one.step(pairs.x, pairs.y, pairs.shape.n)


def gemm(pairs: Pairs) -> Step:
    """The bare encoder product in bfloat16: what no step with a dense encoder can beat, unless in fewer bits."""
    x, W = pairs.x.bfloat16(), torch.randn(pairs.shape.m, pairs.shape.d, device=pairs.device, dtype=torch.bfloat16)
    return lambda: x @ W.T


def has_sparsify() -> bool:
    """Whether eai-sparsify can be imported."""
    return importlib.util.find_spec("sparsify") is not None


def sparsify(pairs: Pairs) -> Step:
    """eai-sparsify: its coder with its Triton decoder and the rest as its Trainer does it."""
    if pairs.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    if importlib.util.find_spec("pyarrow") is None:  # its data set classes, not used here, need it
        stub: Any = types.ModuleType("datasets")
        stub.__spec__ = ModuleSpec("datasets", None)
        stub.__getattr__ = lambda name: object
        sys.modules.setdefault("datasets", stub)
    from sparsify import SparseCoder, SparseCoderConfig

    n, d, m, k = pairs.shape
    coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k, transcode=True), pairs.device, dtype=torch.float32)
    coder.b_dec.data = pairs.y.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=RATE, fused=True)
    since = torch.zeros(m, dtype=torch.long, device=pairs.device)

    def step() -> None:
        out = coder(pairs.x, pairs.y)
        fired = torch.zeros(m, dtype=torch.bool, device=pairs.device)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        since.add_(n)
        since[fired] = 0

    return step


def dense(pairs: Pairs) -> Step:
    """Plain torch: dense products under bfloat16 autocast, as dictionary_learning and SAELens train."""
    n, d, m, k = pairs.shape
    device = pairs.device
    W_enc = nn.Parameter(torch.randn(m, d, device=device) / d**0.5)
    W_dec = nn.Parameter(torch.zeros(m, d, device=device))
    b_enc, b_dec = nn.Parameter(torch.zeros(m, device=device)), nn.Parameter(pairs.y.mean(0))
    parameters = [W_enc, W_dec, b_enc, b_dec]
    adam = torch.optim.Adam(parameters, lr=RATE, fused=True)
    variance = (pairs.y - pairs.y.mean(0)).square().sum()
    since = torch.zeros(m, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            pre = torch.relu(pairs.x @ W_enc.T + b_enc)
            values, indices = pre.topk(k, sorted=False)
            codes: Tensor = torch.zeros_like(pre).scatter_(1, indices, values)
            error = pairs.y - (codes @ W_dec + b_dec)
        (error.float().square().sum() / variance).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        since.add_(n).masked_fill_((codes > 0).any(0), 0)

    return step
