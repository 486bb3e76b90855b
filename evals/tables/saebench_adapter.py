"""An SAE of ours in the form that sae-bench's evaluations take, to run beside ours (benchmarks/saebench_core.py)."""

import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import Kind


class SaeBenchSAE(nn.Module):
    """An SAE of ours in the form that sae-bench takes: dense codes, encoder transposed. `hook_name` is TransformerLens'
    name of where it reads and writes, such as blocks.10.hook_mlp_out."""

    def __init__(self, coder: SparseCoder, model_name: str, hook_name: str, layer: int) -> None:
        super().__init__()
        if coder.cfg.kind != Kind.sae:
            raise UserError(f"sae-bench evaluates SAEs alone: it would compare a {coder.cfg.kind} with its own input")
        from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig

        self.coder = coder
        self.W_dec, self.b_enc, self.b_dec = coder.W_dec, coder.b_enc, coder.b_dec
        self.cfg = CustomSAEConfig(model_name, coder.d_in, coder.cfg.width, layer, hook_name, dtype="float32")

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """[D, M]: encoder weights."""
        return self.coder.W_enc.T

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.coder.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, float32."""
        return self.coder.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """[..., M]: codes, mostly zeros."""
        out = self.coder(x)
        result: Tensor = out.values.new_zeros(*x.shape[:-1], self.coder.cfg.width).scatter_add_(
            -1, out.indices, out.values
        )
        return result

    def decode(self, f: Tensor) -> Tensor:
        """[..., D]: the reconstruction."""
        return f @ self.coder.W_dec + self.coder.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x."""
        return self.decode(self.encode(x))
