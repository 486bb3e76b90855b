"""Coders with random weights of every kind, and how far float32 may carry two ways of computing one apart."""

import torch

from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.files import Provenance
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind

EPS = 2.0**-23


@torch.no_grad()
def random_coder(
    kind: Kind,
    activation: ActivationName = ActivationName.topk,
    d: int = 24,
    width: int = 64,
    k: int = 4,
    d_out: int = 0,
) -> SparseCoder:
    """Every tensor is random; thresholds are such that about k latents fire on standard normal inputs."""
    generator = torch.Generator().manual_seed(7)
    coder = SparseCoder(CoderConfig(kind=kind, activation=activation, k=k, width=width), d, d_out or d)
    for tensor in coder.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * d**-0.5)
    if coder.threshold is not None:
        coder.threshold.copy_(1 + 0.2 * torch.rand(width, generator=generator))
    return coder.requires_grad_(False).eval()


ONE_BY_ONE = [kind for kind in Kind if not CoderConfig(kind=kind).over_layers]
"""The kinds whose coders are trained one by one."""


def meta(hookpoint: str = "layers.1.mlp", kind: Kind = Kind.transcoder) -> Provenance:
    """Where a coder attaches, as coder.json has it."""
    read = "output" if kind == Kind.sae else "input"
    return {
        "model": {
            "id": "tiny",
            "revision": None,
            "gguf_file": None,
            "fingerprint": "0",
            "dtype": "bfloat16",
            "attention": "sdpa",
        },
        "hookpoint": hookpoint,
        "read": {"module": hookpoint, "side": read},
        "write": {"module": hookpoint, "side": "output"},
        "data": {
            "store_identity": "0",
            "source": {"kind": "jsonl", "path": "x.jsonl", "context": 16},
            "filter": {"first_positions": 1, "special_tokens": True},
        },
    }


@torch.no_grad()
def assert_same_function(coder: SparseCoder, x_ND: torch.Tensor, y_NE: torch.Tensor) -> None:
    """`y_NE` is coder(x) up to rounding. A sum of n float32 products, in any order, is off by less than 6 sqrt(n) u
    times the sum of their magnitudes but for one in 10^7 (Higham and Mary 2019; u = EPS / 2); both sides may be. Tokens
    on which the choice of latents hangs on less are left out, and must be few (some of 2,048 latents are near ties)."""
    x = x_ND.float()
    centred = x - (coder.b_pre if coder.b_pre is not None else 0)
    magnitude = centred.abs() @ coder.W_enc.abs().T + coder.b_enc.abs()
    if coder.b_pre is not None:  # x - b_pre is rounded, and an import may fold it into b_enc
        magnitude = magnitude + (x.abs() + 2 * coder.b_pre.abs()) @ coder.W_enc.abs().T
    off_NM = 6 * (coder.d_in + 4) ** 0.5 * EPS * magnitude
    pre = (centred.double() @ coder.W_enc.double().T + coder.b_enc.double()).clamp_min(0)
    if coder.threshold is not None:
        clear = (((pre - coder.threshold).abs() > off_NM) | (coder.threshold == 0)).all(1)  # at 0 nothing jumps
    elif coder.cfg.activation == ActivationName.groupmax:
        top, off = (z.view(len(x), coder.cfg.k, -1).topk(2, -1).values for z in (pre, off_NM))
        clear = ((top[..., 0] - top[..., 1] > 2 * off[..., 0]) | (top[..., 0] == 0)).all(1)
    else:
        top = pre.topk(coder.cfg.k + 1, -1).values
        clear = (top[:, -2] - top[:, -1] > 2 * off_NM.amax(1)) | (top[:, -2] == 0)
    assert clear.float().mean() > 0.8, clear.float().mean()
    out = coder(x)
    terms = out.values.shape[-1] + coder.d_in + 4
    parts = (out.values[..., None] * coder.W_dec[out.indices].abs()).sum(1) + coder.b_dec.abs()
    parts = parts + (0 if coder.W_skip is None else x.abs() @ coder.W_skip.abs().T)
    from_values = torch.zeros_like(y_NE)
    if coder.threshold is not None:
        from_values = (off_NM * ((coder.threshold == 0) & (pre <= off_NM))) @ coder.W_dec.abs()
    from_values += (off_NM.gather(1, out.indices)[..., None] * coder.W_dec[out.indices].abs()).sum(1)
    bound = 6 * terms**0.5 * EPS * parts + from_values
    difference = (out.y_hat - y_NE).abs()
    assert (difference <= bound)[clear].all(), ((difference / bound)[clear].max(), clear.sum())
