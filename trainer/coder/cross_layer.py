"""Cross-layer transcoders: coders of several layers whose latents also write to later ones.

    f_l   = activation(W_enc,l x_l + b_enc,l)
    ŷ_t   = Σ f_l W_dec,l->t  over the layers l = t - window ... t,  + W_skip,t x_t + b_dec,t

A layer's decoders lie side by side in one matrix, its own first, so a layer is a SparseCoder that writes a row of
several sides. The latents of all layers are numbered through, layer by layer.

Legend: N tokens, L layers, M latents of one layer, D input width, E output width of one layer, K latents on a token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from skipcoder.errors import UserError
from skipcoder.settings import typed
from skipcoder.trainer.coder.coder import CoderOutput, SparseCoder, described
from skipcoder.trainer.coder.files import Loaded, Provenance, write_coder
from skipcoder.trainer.config import CoderConfig, Kind


class LayerCoder(SparseCoder):
    """The coder of one layer. Bias and skip are for the layer's own output alone."""

    def __init__(self, cfg: CoderConfig, d_in: int, widths: Sequence[int], seed: int = 0) -> None:
        """`widths`: of the outputs it writes to, its own first."""
        super().__init__(cfg, d_in, sum(widths), seed)
        self.own, self.widths = widths[0], list(widths)
        self.b_dec = nn.Parameter(torch.zeros(self.own))
        if cfg.kind == Kind.skip_clt:
            self.W_skip = nn.Parameter(torch.zeros(self.own, d_in))

    @torch.no_grad()
    def init_biases(self, mean_x_D: Tensor, mean_y_E: Tensor) -> None:
        """Start as the constant function mean(y) of the layer's own output."""
        super().init_biases(mean_x_D, mean_y_E[: self.own])

    def rescale(self, s_in: float | Tensor, s_out: float | Tensor) -> None:
        """Change the weights so that the new coder(s_in x) is s_out times the old coder(x)."""
        own = s_out[: self.own] if isinstance(s_out, Tensor) else s_out
        self.W_enc.div_(s_in)
        self.W_dec.mul_(s_out)
        self.b_dec.mul_(own)
        if self.W_skip is not None:
            self.W_skip.div_(s_in).mul_(own[:, None] if isinstance(own, Tensor) else own)

    def affine(self, x_ND: Tensor) -> Tensor:
        """Return what the sparse part is added to, [d_out] or [N, d_out]: 0 for later layers."""
        own = super().affine(x_ND)
        return F.pad(own, (0, self.d_out - self.own)) if self.d_out > self.own else own


def targets(layer: int, layers: int, window: int | None) -> range:
    """Return the layers that a layer's latents write to.

    >>> targets(1, 4, 1), targets(1, 4, None)
    (range(1, 3), range(1, 4))
    """
    return range(layer, layers if window is None else min(layers, layer + window + 1))


class CrossLayerTranscoder(nn.Module):
    """Coders of all layers as one: it reads the inputs of the MLPs one after another, and writes their outputs."""

    def __init__(self, cfg: CoderConfig, layers: Sequence[LayerCoder]) -> None:
        super().__init__()
        self.cfg, self.layers = cfg, nn.ModuleList(layers)
        self.d_ins, self.d_outs = [one.d_in for one in layers], [one.own for one in layers]
        self.d_in, self.d_out = sum(self.d_ins), sum(self.d_outs)
        self.latents = range(sum(len(one.latents) for one in layers))
        self.meta: Provenance = {}
        self.folder: Path | None = None
        self.longest = None

    def __repr__(self) -> str:
        cfg = self.cfg
        what = f"{cfg.kind}, {cfg.activation} k={cfg.k}, {cfg.width:,} latents in each of {len(self.layers)} layers"
        return f"<{type(self).__name__} {what}, window {cfg.window}>"

    def __iter__(self) -> Any:
        return iter(self.layers)

    def to_later(self, layer: int, y_hat_NE: Tensor) -> list[tuple[int, Tensor]]:
        """Return (layer, [N, E] what is written to it) of what one layer writes."""
        one = cast(LayerCoder, self.layers[layer])
        return list(enumerate(y_hat_NE.split(one.widths, 1), layer))

    def forward(self, x: Tensor) -> CoderOutput:
        """Encode and decode activations [..., L D]; latent j of layer l is number l M + j."""
        if x.shape[-1] != self.d_in:
            raise UserError(f"{self!r} reads {self.d_in} dimensions, not {x.shape[-1]}: other activations?")
        x_ND = x.reshape(-1, self.d_in)
        written: list[Tensor | None] = [None] * len(self.layers)
        values, indices, first = [], [], 0
        for layer, (one, x_l) in enumerate(zip(self, x_ND.split(self.d_ins, 1), strict=True)):
            codes = one.encode(x_l)
            for target, part in self.to_later(layer, one.decode(codes, x_l)):
                before = written[target]
                written[target] = part if before is None else before + part
            v, i = codes.padded()
            values.append(v)
            indices.append(i + first)
            first += len(one.latents)
        lead = x.shape[:-1]
        y_hat = torch.cat([z for z in written if z is not None], 1).view(*lead, self.d_out)
        v, i = torch.cat(values, 1), torch.cat(indices, 1)
        return CoderOutput(y_hat, v.view(*lead, v.shape[1]), i.view(*lead, i.shape[1]))

    @torch.no_grad()
    def earlier_shares(self, x_ND: Tensor) -> list[float]:
        """Return, for each layer's output, earlier layers' share of the summed squared lengths of what latents write
        there: 0 if all comes from the layer's own."""
        own, earlier = ([0.0] * len(self.layers) for _ in range(2))
        for layer, (one, x_l) in enumerate(zip(self, x_ND.split(self.d_ins, 1), strict=True)):
            latents_NE = one.decode(one.encode(x_l), x_l) - one.affine(x_l)
            for target, part in self.to_later(layer, latents_NE):
                (own if target == layer else earlier)[target] += float(part.double().square().sum())
        return [e / max(e + o, 1e-30) for o, e in zip(own, earlier, strict=True)]

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """[L M, D], of layers that are equally wide."""
        return torch.cat([one.W_enc for one in self])

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """[L M, E]: the sum of each latent's decoders."""
        return torch.cat([torch.stack(one.W_dec.split(one.widths, 1)).sum(0) for one in self])

    W_skip = None

    def side_norms(self) -> Tensor:
        """Length [L M, L] of each latent's decoder for each layer."""
        rows = []
        for layer, one in enumerate(self):
            norms = torch.stack([part.detach().norm(dim=1) for part in one.W_dec.split(one.widths, 1)], 1)
            rows.append(F.pad(norms, (layer, len(self.layers) - layer - norms.shape[1])))
        return torch.cat(rows)

    def save(self, folder: Path) -> None:
        """Write coder.safetensors and coder.json."""
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        facts: Any = described(self.cfg, self.d_in, self.d_out, self.meta)
        write_coder(folder, tensors, facts)

    @classmethod
    def from_files(cls, path: Path, loaded: Loaded) -> "CrossLayerTranscoder":
        """Make the coder that files hold."""
        facts: dict[str, Any] = dict(loaded.description)
        cfg = typed(
            OmegaConf.create({f: facts.pop(f) for f in CoderConfig.__dataclass_fields__ if f in facts}), CoderConfig
        )
        ins, outs = ([side["width"] for side in facts[key]] for key in ("read_sides", "sides"))
        layers = [
            LayerCoder(cfg, d_in, [outs[t] for t in targets(layer, len(outs), cfg.window)])
            for layer, d_in in enumerate(ins)
        ]
        coder = cls(cfg, layers)
        try:
            coder.load_state_dict(loaded.tensors)
        except RuntimeError as error:
            raise UserError(f"the coder in {path} is damaged: {str(error).splitlines()[-1].strip()}") from None
        for key in ("format_version", "dtype", "subtract_decoder_bias", "d_in", "d_out"):
            del facts[key]
        coder.meta, coder.folder = cast(Provenance, facts), path
        return coder.requires_grad_(False).eval()
