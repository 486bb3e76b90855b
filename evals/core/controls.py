"""Controls to compare a coder with: the MLP's own neurons, and the best affine map. Both are called like coders.

Legend: N tokens, K neurons, M neurons of the MLP, D input width, E output width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.evals.config import Control
from skipcoder.pipeline.model.hooks import argument, first_tensor
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.coder import CoderOutput
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.run import Run, Summary
from skipcoder.trainer.step.skip_init import ridge

AFFINE = 1024
"""Training tokens for each dimension from which the affine map is made, where there are so many."""
SAMPLE = 4096
"""Training tokens from which the mean of the neurons that are left out is taken."""


@dataclass
class Size:
    """What other code reads of a coder's configuration."""

    k: int
    width: int


class Neurons(nn.Module):
    """The k neurons of an MLP that add the longest vectors to its output, and the mean of what the others add: a coder
    that needs no training."""

    W_skip = None
    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, mlp: nn.Module, k: int, sample_ND: Tensor) -> None:
        """`sample_ND`: inputs of the MLP, from which the mean is taken. UserError unless its output is that of one last
        linear map."""
        super().__init__()
        last = _last_linear(mlp, sample_ND[:8])
        self._model = (mlp, last)  # in a tuple, not as submodules: they stay with the model
        weight = last.weight.detach().float()
        W_dec_ME = weight.T.contiguous() if isinstance(last, nn.Linear) else weight  # GPT-2's Conv1D is [M, E]
        bias = getattr(last, "bias", None)
        self.register_buffer("W_dec", W_dec_ME)
        self.register_buffer("b_dec", W_dec_ME.new_zeros(W_dec_ME.shape[1]) if bias is None else bias.detach().float())
        self.cfg, self.d_out = Size(min(k, len(W_dec_ME)), len(W_dec_ME)), W_dec_ME.shape[1]
        whole_E = self._neurons(sample_ND).mean(0) @ self.W_dec + self.b_dec
        self.b_dec = self.b_dec + (whole_E - self(sample_ND).y_hat.mean(0))  # not in place: it may be the model's own

    @torch.no_grad()
    def forward(self, x: Tensor) -> CoderOutput:
        """Activations of the chosen neurons, which may be negative, and the output that they add up to."""
        neurons_NM = self._neurons(x)
        indices = (neurons_NM.abs() * self.W_dec.norm(dim=1)).topk(self.cfg.k, sorted=False).indices
        values = neurons_NM.gather(1, indices)
        sparse = torch.zeros_like(neurons_NM).scatter_(1, indices, values)
        return CoderOutput(sparse @ self.W_dec + self.b_dec, values, indices)

    @torch.no_grad()
    def _neurons(self, x_ND: Tensor) -> Tensor:
        """Activations of all neurons, float32 [N, M]."""
        mlp, last = self._model
        found: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        try:
            mlp.forward(x_ND.to(last.weight.dtype)[None])  # bypasses its hooks, from which we may be called
        finally:
            handle.remove()
        return found[0][0].float()


class Affine(nn.Module):
    """y = W x + b: what can be reached without any latent."""

    W_skip = None
    W: Tensor
    b: Tensor

    def __init__(self, W_ED: Tensor, b_E: Tensor) -> None:
        super().__init__()
        self.register_buffer("W", W_ED.float())
        self.register_buffer("b", b_E.float())
        self.register_buffer("W_dec", torch.zeros(1, len(b_E)))
        self.d_out, self.cfg = len(b_E), Size(0, 1)

    def forward(self, x: Tensor) -> CoderOutput:
        """W x + b; no latent ever fires."""
        values = torch.zeros(len(x), 1, device=x.device)
        return CoderOutput(x.float() @ self.W.T + self.b, values, values.long())


def control_runs(asked: list[Control], runs: list[Run], model: nn.Module, store: ActivationStore) -> list[Run]:
    """Controls for the transcoders among `runs` (an SAE has no other side): neurons for each hookpoint and k, an affine
    map for each hookpoint."""
    found: dict[tuple[Control, str, int], Run] = {}
    for run in runs:
        if run.several:
            continue
        read, write = run.read_site, run.write_site
        if (read.side, write.side) != ("input", "output"):
            continue
        hookpoint = run.summary["hookpoint"]
        for control in asked:
            k = run.coder.cfg.k if control is Control.neurons else 0
            if (control, hookpoint, k) in found:
                continue
            coder: Any
            if control is Control.neurons:
                mlp = getattr(model, "base_model", model).get_submodule(read.module)
                if read.module != write.module:
                    raise UserError(
                        f"controls=[neurons]: {write.module} stands between the MLP's neurons and its output"
                    )
                stream = ActivationStream(store, hookpoint, SAMPLE, filter=run.filter, epochs=1)
                sample = next(iter(stream)).x
                coder = Neurons(mlp, k, sample.to(next(mlp.parameters()).device))
            else:
                device = str(next(model.parameters()).device)
                coder = Affine(*ridge(store, hookpoint, run.filter, device, AFFINE))
            summary: Summary = {
                "hookpoint": hookpoint, "model": run.summary["model"], "kind": control.value, "k": k,
                "width": coder.cfg.width, "seed": None, "train_tokens": 0, "seconds": 0.0,
            }  # fmt: skip
            coder.meta = run.coder.meta
            found[control, hookpoint, k] = replace(
                run,
                path=Path(f"{Path(run.store_path).stem}:{hookpoint}:{control.value}-k{k}"),
                summary=summary,
                coder=coder,
                is_control=True,
            )
    return list(found.values())


def _last_linear(mlp: nn.Module, sample_ND: Tensor) -> Any:
    """The linear map whose output is the MLP's output."""
    ran: list[tuple[nn.Module, Tensor, Tensor]] = []
    linear = [module for module in mlp.modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"]
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, out: ran.append((module, argument(args, kwargs), out)), with_kwargs=True
        )
        for module in linear
    ]
    try:
        with torch.no_grad():
            y = first_tensor(mlp(sample_ND.to(next(mlp.parameters()).dtype)[None]))
    finally:
        for handle in handles:
            handle.remove()
    for module, _, out in reversed(ran):
        if out.shape == y.shape and torch.equal(out, y):
            return module
    raise UserError(
        "controls=[neurons]: this MLP's output is not that of one linear map, so its neurons cannot be told"
    )
