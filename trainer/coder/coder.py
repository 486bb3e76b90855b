"""SparseCoder: one module for SAEs, crosscoders, transcoders and skip transcoders.

    pre   = W_enc (x - b_pre) + b_enc        b_pre = b_dec for SAEs and crosscoders, 0 for transcoders
    f     = activation(pre)                  top-k, group max, batch top-k or jumprelu
    y_hat = f W_dec + W_skip x + b_dec       W_skip for skip transcoders only

A crosscoder is an SAE of several sides of a token, which x and y_hat hold one after another.

Legend: N tokens, K active latents, M latents, D input width, E output width.
"""

from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from skipcoder import hub
from skipcoder.errors import UserError
from skipcoder.kernels.decode import sparse_decode
from skipcoder.kernels.encode import Codes
from skipcoder.kernels.preactivations import EXACT
from skipcoder.registry import Registry
from skipcoder.settings import typed
from skipcoder.trainer.coder import readers
from skipcoder.trainer.coder.activations import ACTIVATIONS, Activation
from skipcoder.trainer.coder.files import (
    FORMAT_VERSION,
    Provenance,
    read_coder,
    write_coder,
    write_index,
    write_part,
)
from skipcoder.trainer.coder.shard import EVERYWHERE, Shard, uniform_rows
from skipcoder.trainer.config import CoderConfig, Kind


class CoderOutput(NamedTuple):
    """What `coder(x)` returns; leading dimensions are those of x."""

    y_hat: Tensor
    """[..., E] reconstruction (SAE) or prediction (transcoder) of the MLP side the coder writes."""
    values: Tensor
    """[..., K] activations of the chosen latents, 0 where fewer fire; batchtopk, jumprelu: K is the most on a token."""
    indices: Tensor
    """int64 [..., K] the chosen latents."""


class SparseCoder(nn.Module):
    """A sparse coder. Its parameters are float32 and fit activations as the model makes them."""

    threshold: Tensor | None
    """[M], what a pre-activation must exceed: for batchtopk outside training, for jumprelu always."""

    def __init__(self, cfg: CoderConfig, d_in: int, d_out: int, seed: int = 0, shard: Shard | None = None) -> None:
        """`shard`: the latents to hold; None: all."""
        super().__init__()
        if cfg.reconstructs and d_in != d_out:
            raise ValueError(f"a coder of kind {cfg.kind} writes what it reads, but d_in={d_in} and d_out={d_out}")
        self.cfg, self.d_in, self.d_out, self.shard = cfg, d_in, d_out, shard
        self.latents = range(cfg.width) if shard is None else shard.rows
        """Those that are here, one for each row of the parameters."""
        self.activation: Activation = ACTIVATIONS[cfg.activation]
        self.activation.check(cfg)
        self.meta: Provenance = {}
        self.folder: Path | None = None
        """Where it was loaded from."""
        self.search = EXACT
        """How the encoder finds latents; in a mode other than float32 the skip's product is in bfloat16."""
        self.W_enc = nn.Parameter(uniform_rows(self.latents, d_in, d_in**-0.5, seed))
        self.b_enc = nn.Parameter(torch.zeros(len(self.latents)))
        if cfg.reconstructs:
            self.W_dec = nn.Parameter(nn.functional.normalize(self.W_enc.detach(), dim=1))
        else:
            self.W_dec = nn.Parameter(torch.zeros(len(self.latents), d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in)) if cfg.kind == Kind.skip_transcoder else None
        self.activation.attach(self)
        if not hasattr(self, "threshold"):
            self.threshold = None

    def __repr__(self) -> str:
        cfg, of = self.cfg, (f", of {self.meta['hookpoint']}" if "hookpoint" in self.meta else "")
        what = f"{cfg.kind}, {cfg.activation} k={cfg.k}, {cfg.width:,} latents, {self.d_in} to {self.d_out}{of}"
        return f"<{type(self).__name__} {what}>"

    @torch.no_grad()
    def init_biases(self, mean_x_D: Tensor, mean_y_E: Tensor) -> None:
        """Start as the constant function mean(y), with the encoder centred on mean(x)."""
        self.b_dec.copy_(mean_y_E)
        if not self.cfg.reconstructs:  # others are centred by b_pre = b_dec
            self.b_enc.copy_(-self.W_enc @ mean_x_D.to(self.W_enc))

    @property
    def b_pre(self) -> Tensor | None:
        """What the encoder subtracts from its input."""
        if not self.cfg.reconstructs:
            return None
        return self.b_dec if self.shard is None else self.shard.read(self.b_dec)

    @property
    def longest(self) -> dict[str, float] | None:
        """The longest `input` and `output` of the MLP that it was trained on, if training left out longer ones."""
        found = self.meta.get("data", {}).get("filter", {}).get("longest")
        sides = zip(("input", "output"), found or (), strict=bool(found))
        return {side: most for side, most in sides if most is not None} if found else None

    def encode(self, x_ND: Tensor, k: int | None = None) -> Codes:
        """Return values and indices of the active latents of each token (K of them, or `k`)."""
        return self.activation.encode(self, x_ND, k)

    def rescale(self, s_in: float | Tensor, s_out: float | Tensor) -> None:
        """Change the weights so that the new coder(s_in x) is s_out times the old coder(x) (fold.py). Of a coder over
        several sides a scale may be a tensor, with one for each number of a row."""
        self.W_enc.div_(s_in)
        self.W_dec.mul_(s_out)
        self.b_dec.mul_(s_out)
        if self.W_skip is not None:
            self.W_skip.div_(s_in).mul_(s_out[:, None] if isinstance(s_out, Tensor) else s_out)

    def decode(self, codes: Codes, x_ND: Tensor) -> Tensor:
        """Return [N, E]: the sparse part, plus bias, plus the skip of `x_ND`. Of a shard without gradients."""
        if self.shard is None:
            return sparse_decode(codes, self.W_dec, self.affine(x_ND))
        partial = sparse_decode(codes, self.W_dec, torch.zeros_like(self.b_dec))
        return self.shard.sum(partial.detach()) + self.affine(x_ND)

    def affine(self, x_ND: Tensor) -> Tensor:
        """Return what the sparse part is added to: b_dec [E] or, with a skip, W_skip x + b_dec [N, E]."""
        if self.W_skip is None:
            return self.b_dec
        dtype = self.W_skip.dtype if self.search.is_exact else torch.bfloat16
        return (x_ND.to(dtype) @ self.W_skip.to(dtype).T).to(self.b_dec.dtype) + self.b_dec

    def forward(self, x: Tensor) -> CoderOutput:
        """Encode and decode activations [..., D]. UserError for another D."""
        if x.shape[-1] != self.d_in:
            raise UserError(f"{self!r} reads {self.d_in} dimensions, not {x.shape[-1]}: other activations?")
        x_ND = x.reshape(-1, self.d_in)
        codes = self.encode(x_ND)
        lead, (values, indices) = x.shape[:-1], codes.padded()
        y_hat = self.decode(codes, x_ND).view(*lead, self.d_out)
        k = values.shape[1]
        return CoderOutput(y_hat, values.view(*lead, k), indices.view(*lead, k))

    def skip_only(self, x: Tensor) -> Tensor:
        """Return [..., E]: the prediction with every latent at 0 (the affine part of a skip transcoder)."""
        if self.W_skip is None:
            return self.b_dec.expand(*x.shape[:-1], self.d_out)
        return x.to(self.W_skip.dtype) @ self.W_skip.T + self.b_dec

    def side_norms(self) -> Tensor:
        """Length [M, S] of each latent's decoder on each of the sides that `meta` names."""
        parts = self.W_dec.detach().split([side["width"] for side in self.meta["sides"]], 1)
        return torch.stack([z.norm(dim=1) for z in parts], 1)

    def save(self, folder: Path) -> None:
        """Write coder.safetensors and coder.json. Shards are saved together, one file of tensors each."""
        description: Any = described(self.cfg, self.d_in, self.d_out, self.meta)
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        if self.shard is None:
            write_coder(folder, tensors, description)
            return
        group = self.shard.group
        kept = {name: t for name, t in tensors.items() if group.is_main or name not in EVERYWHERE}
        description = group.told(description)
        with group.together():
            write_part(folder, kept, description, group.rank, group.size)
        if group.is_main:
            write_index(folder, description, group.size)

    @classmethod
    def load(cls, path: str | Path) -> "SparseCoder":
        """Load a run directory, its checkpoint/ folder, or a folder that holds coder.safetensors. Of a cross-layer
        transcoder this is a CrossLayerTranscoder."""
        loaded = read_coder(Path(path))
        tensors, description = loaded
        if description["kind"] in (Kind.clt, Kind.skip_clt):
            several = import_module("skipcoder.trainer.coder.cross_layer").CrossLayerTranscoder  # which imports us
            return cast(SparseCoder, several.from_files(Path(path), loaded))
        facts: dict[str, Any] = dict(description)
        fields = {field: facts.pop(field) for field in CoderConfig.__dataclass_fields__ if field in facts}  # or older
        cfg, d_in, d_out = typed(OmegaConf.create(fields), CoderConfig), facts.pop("d_in"), facts.pop("d_out")
        for name, wanted in (("W_enc", (cfg.width, d_in)), ("W_dec", (cfg.width, d_out))):
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != wanted and KINDS[cfg.kind] is SparseCoder:  # before memory is taken for what may be a lie
                raise UserError(f"the coder in {path} is damaged: {name} has shape {found}, not {wanted}")
        coder = make_coder(cfg, d_in, d_out)
        coder.load_state_dict(tensors)
        for key in ("format_version", "dtype", "subtract_decoder_bias"):
            del facts[key]
        coder.meta = cast(Provenance, facts)
        coder.folder = Path(path)
        return coder.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls, name: str, revision: str | None = None, subfolder: str | None = None, **options: Any
    ) -> "SparseCoder":
        """Load a coder from a folder, or from ORG/NAME on the Hugging Face Hub, in any format that can be imported
        (docs/formats.md); `options` are those of the format."""
        coder = readers.read(hub.folder_of(name, revision, subfolder), **options)
        if not isinstance(coder, SparseCoder):
            raise UserError(f"{name}: its format gives a {type(coder).__name__}, not a SparseCoder")
        return coder


def described(cfg: CoderConfig, d_in: int, d_out: int, meta: Provenance) -> dict[str, Any]:
    """Return what coder.json says of a coder."""
    return {
        "format_version": FORMAT_VERSION,
        **{key: value.value if isinstance(value, Enum) else value for key, value in vars(cfg).items()},
        "d_in": d_in,
        "d_out": d_out,
        "dtype": "float32",
        "subtract_decoder_bias": cfg.reconstructs,
        **meta,
    }


KINDS: Registry[type[SparseCoder]] = Registry("coder.kind", dict.fromkeys(Kind, SparseCoder))
"""The class of each kind of coder; all but SAEs and crosscoders read an MLP's input and write its output."""


def make_coder(cfg: CoderConfig, d_in: int, d_out: int, seed: int = 0, shard: Shard | None = None) -> SparseCoder:
    """Make a new coder, or a shard of one; `seed` is that of its initialisation."""
    return KINDS[cfg.kind](cfg, d_in, d_out, seed, *(() if shard is None else (shard,)))
