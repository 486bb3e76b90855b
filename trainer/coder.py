"""SparseCoder: one module for SAEs, transcoders and skip transcoders.

    pre   = W_enc (x - b_pre) + b_enc        b_pre = b_dec for an SAE, 0 for transcoders
    f     = activation(pre)                  top-k, group max, batch top-k or jumprelu
    y_hat = f W_dec + W_skip x + b_dec       W_skip for skip transcoders only

Legend: N tokens, K active latents, M latents, D input width, E output width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from skipcoder.kernels.decode import sparse_decode
from skipcoder.kernels.encode import Codes, encode
from skipcoder.kernels.jumprelu import fires, jumprelu, per_entry
from skipcoder.pipeline.registry import Registry
from skipcoder.trainer.config import Activation, CoderConfig, Kind
from torch import Tensor, nn

BANDWIDTH = 1e-3
"""Width of the window in which a jumprelu threshold learns, relative to the length of an input (arXiv 2407.14435 scales
inputs to length 1; here their elements are about 1)."""


HINT = 0.8
"""Of batchtopk's running threshold: where its search begins."""


@dataclass(frozen=True)
class Encoding:
    """How latents are found; see kernels.encode. The default is exact."""

    mode: str = "float32"
    nominated: float = 1.25
    chunk_elements: int = 2**24
    centre_D: Tensor | None = None
    """Mean of the encoder's input, for `scout`."""
    spread_D: Tensor | None = None
    """What a scout divides its dimensions by."""


class CoderOutput(NamedTuple):
    """What `coder(x)` gives; leading dimensions are those of x."""

    y_hat: Tensor
    """[..., E] reconstruction (SAE) or prediction (transcoder) of the MLP side the coder writes."""
    values: Tensor
    """[..., K] activations of the chosen latents, 0 where fewer fire; batchtopk, jumprelu: K is the most of a token."""
    indices: Tensor
    """int64 [..., K] the chosen latents."""


class SparseCoder(nn.Module):
    """A sparse coder. Parameters are float32 and take activations as the model makes them."""

    def __init__(self, cfg: CoderConfig, d_in: int, d_out: int, seed: int = 0) -> None:
        super().__init__()
        if cfg.kind == Kind.sae and d_in != d_out:
            raise ValueError(f"an SAE reconstructs what it reads, but d_in={d_in} and d_out={d_out}")
        self.cfg, self.d_in, self.d_out = cfg, d_in, d_out
        self.meta: dict[str, Any] = {}
        """Provenance, as in coder.json: model, hookpoint, read and write sites, scales, data."""
        self.encoding = Encoding()
        """How the encoder finds latents; in a mode other than float32 the skip's product is bfloat16."""
        bound = d_in**-0.5
        generator = torch.Generator().manual_seed(seed)
        self.W_enc = nn.Parameter(torch.rand(cfg.width, d_in, generator=generator) * 2 * bound - bound)
        self.b_enc = nn.Parameter(torch.zeros(cfg.width))
        if cfg.kind == Kind.sae:
            self.W_dec = nn.Parameter(nn.functional.normalize(self.W_enc.detach(), dim=1))
        else:
            self.W_dec = nn.Parameter(torch.zeros(cfg.width, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in)) if cfg.kind == Kind.skip_transcoder else None
        self.threshold: Tensor | None = None
        """[M], what a pre-activation must exceed: of batchtopk outside training, of jumprelu always."""
        if cfg.activation == Activation.jumprelu:
            self.threshold = nn.Parameter(torch.zeros(cfg.width))
        elif cfg.activation == Activation.batchtopk:
            del self.threshold
            self.register_buffer("threshold", torch.zeros(cfg.width))

    @torch.no_grad()
    def init_biases(self, mean_x_D: Tensor, mean_y_E: Tensor) -> None:
        """Start as the constant function mean(y), with the encoder centred on mean(x)."""
        self.b_dec.copy_(mean_y_E)
        if self.cfg.kind != Kind.sae:  # an SAE is centred by b_pre = b_dec
            self.b_enc.copy_(-self.W_enc @ mean_x_D.to(self.W_enc))

    @property
    def b_pre(self) -> Tensor | None:
        """What the encoder subtracts from its input."""
        return self.b_dec if self.cfg.kind == Kind.sae else None

    def encode(self, x_ND: Tensor, k: int | None = None) -> Codes:
        """Values and indices of the active latents of each token (K of them, or `k`)."""
        return ACTIVATIONS[self.cfg.activation](self, x_ND, k)

    def encode_jumprelu(self, x_ND: Tensor) -> tuple[Codes, Tensor]:
        """Codes, and how many latents fire on all of these tokens, with gradients to the thresholds."""
        assert self.threshold is not None
        bandwidth = BANDWIDTH * self.d_in**0.5
        codes = self._encode(x_ND, "above", threshold_M=self.threshold.detach() - bandwidth / 2)
        theta_L = per_entry(self.threshold, codes.indices, codes.by_latent)
        fired = fires(codes.values, theta_L, bandwidth).sum()
        return codes._replace(values=jumprelu(codes.values, theta_L, bandwidth)), fired

    def _encode(self, x_ND: Tensor, activation: str, k: int | None = None, **options: Any) -> Codes:
        x_ND = x_ND.to(self.W_enc.dtype)
        k = k or self.cfg.k
        return encode(x_ND, self.W_enc, self.b_enc, k, self.b_pre, activation, **vars(self.encoding), **options)

    def rescale(self, s_in: float, s_out: float) -> None:
        """Change the weights so that coder(s_in x) becomes s_out times what coder(x) was (fold.py)."""
        self.W_enc.div_(s_in)
        self.W_dec.mul_(s_out)
        self.b_dec.mul_(s_out)
        if self.W_skip is not None:
            self.W_skip.mul_(s_out / s_in)

    def decode(self, codes: Codes, x_ND: Tensor) -> Tensor:
        """[N, E]: the sparse part, plus bias, plus the skip of `x_ND`."""
        return sparse_decode(codes, self.W_dec, self.affine(x_ND))

    def affine(self, x_ND: Tensor) -> Tensor:
        """What the latents are added to: b_dec [E], or with a skip W_skip x + b_dec [N, E]."""
        if self.W_skip is None:
            return self.b_dec
        dtype = self.W_skip.dtype if self.encoding.mode == "float32" else torch.bfloat16
        return (x_ND.to(dtype) @ self.W_skip.to(dtype).T).to(self.b_dec.dtype) + self.b_dec

    def forward(self, x: Tensor) -> CoderOutput:
        """Encode and decode activations [..., D]."""
        x_ND = x.reshape(-1, self.d_in)
        codes = self.encode(x_ND)
        lead, (values, indices) = x.shape[:-1], codes.padded()
        y_hat = self.decode(codes, x_ND).view(*lead, self.d_out)
        k = values.shape[1]
        return CoderOutput(y_hat, values.view(*lead, k), indices.view(*lead, k))

    def skip_only(self, x: Tensor) -> Tensor:
        """[..., E]: the prediction with every latent at 0 (the affine part of a skip transcoder)."""
        if self.W_skip is None:
            return self.b_dec.expand(*x.shape[:-1], self.d_out)
        return x.to(self.W_skip.dtype) @ self.W_skip.T + self.b_dec

    @classmethod
    def load(cls, path: str | Path) -> "SparseCoder":
        """Load a run directory, its checkpoint/ folder, or a folder that holds coder.safetensors."""
        from skipcoder.trainer.checkpoint import load_coder

        return load_coder(Path(path))

    @classmethod
    def from_pretrained(
        cls, name: str, revision: str | None = None, subfolder: str | None = None, **options: Any
    ) -> "SparseCoder":
        """Load a coder of a folder, or of ORG/NAME on the Hugging Face Hub, in any format that can be imported
        (docs/formats.md); `options` are those of the format."""
        from skipcoder.trainer import formats, hub

        return formats.read(hub.folder_of(name, revision, subfolder), **options)


def _batchtopk(coder: SparseCoder, x_ND: Tensor, k: int | None) -> Codes:
    """The whole batch competes in training, a threshold decides afterwards."""
    if not coder.training:
        return coder._encode(x_ND, "above", threshold_M=coder.threshold)
    if k not in (None, coder.cfg.k):
        return coder._encode(x_ND, "batchtopk", k)
    assert coder.threshold is not None
    return coder._encode(x_ND, "batchtopk", k, threshold_M=HINT * coder.threshold)


ACTIVATIONS: Registry[Callable[[SparseCoder, Tensor, int | None], Codes]] = Registry(
    "coder.activation",
    {
        Activation.topk: lambda coder, x_ND, k: coder._encode(x_ND, "topk", k),
        Activation.groupmax: lambda coder, x_ND, k: coder._encode(x_ND, "groupmax", k),
        Activation.batchtopk: _batchtopk,
        Activation.jumprelu: lambda coder, x_ND, k: coder.encode_jumprelu(x_ND)[0],
    },
)
"""How a coder finds the active latents of tokens [N, D] (k of them, if it is given)."""

KINDS: Registry[type[SparseCoder]] = Registry("coder.kind", dict.fromkeys(Kind, SparseCoder))
"""The class of each kind of coder; all but SAEs read an MLP's input and write its output."""


def make_coder(cfg: CoderConfig, d_in: int, d_out: int, seed: int = 0) -> SparseCoder:
    """A new coder; `seed` is that of its initialisation."""
    return KINDS[cfg.kind](cfg, d_in, d_out, seed)
