"""eai-sparsify's own Trainer, for benchmarks that compare with it.

    pip install --no-deps --target DIR eai-sparsify==1.3.3 einops natsort schedulefree simple-parsing docstring-parser

and give `--sparsify DIR`.
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skipcoder.evals.core.metrics import ReconstructionMetrics, Targets
from skipcoder.trainer.config import Kind


class Rows:
    """Rows of token ids [R, T] as the data set that Trainer asks for."""

    def __init__(self, rows_RT: Tensor) -> None:
        self.rows_RT = rows_RT

    def __len__(self) -> int:
        return len(self.rows_RT)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows_RT[i]}


class _Mlp(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Playback(nn.Module):
    """A language model for Trainer whose "token ids" are numbers of cached pairs: its one MLP reads x[i] and writes
    y[i]."""

    hookpoint = "mlp"

    def __init__(self, x_ND: Tensor, y_NE: Tensor) -> None:
        super().__init__()
        self.x_ND, self.y_NE, self.mlp = x_ND, y_NE, _Mlp()
        self.base_model, self.device = self, torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        """[R, T] -> [R, T, E]."""
        return self.mlp(self.x_ND[input_ids].float(), self.y_NE[input_ids].float())


class Recipe(NamedTuple):
    """What to train."""

    kind: Kind
    k: int
    width: int
    lr: float
    seed: int


def use(folder: Path) -> None:
    """Make the installed package importable. Its Triton decoder has no CPU driver."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    sys.path.insert(0, str(folder))


def fit(model: Any, hookpoint: str, rows_RT: Tensor, batch_rows: int, recipe: Recipe, folder: Path) -> Any:
    """Run Trainer.fit with Adam; our warm-up, which ends in Trainer's own linear decay. Returns its SparseCoder."""
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    steps = len(rows_RT) // batch_rows
    sae = SparseCoderConfig(
        num_latents=recipe.width,
        k=recipe.k,
        transcode=recipe.kind != Kind.sae,
        skip_connection=recipe.kind == Kind.skip_transcoder,
    )
    cfg = TrainConfig(
        sae,
        batch_size=batch_rows,
        optimizer="adam",
        lr=recipe.lr,
        lr_warmup_steps=-(-steps // 20),
        hookpoints=[hookpoint],
        init_seeds=[recipe.seed],
        save_every=10**9,
        log_to_wandb=False,
        run_name="run",
        save_dir=str(folder),
    )
    Trainer(cfg, Rows(rows_RT), model).fit()
    return SparseCoder.load_from_disk(folder / "run" / hookpoint)


@torch.no_grad()
def measure(coder: Any, kind: Kind, x_ND: Tensor, y_NE: Tensor) -> dict[str, Any]:
    """FVU, dead fraction and the rest on held-out pairs, by our own metrics."""
    targets = Targets([y_NE.shape[1]])
    metrics = ReconstructionMetrics(coder.num_latents, targets)
    for x, y in zip(x_ND.split(4096), y_NE.split(4096), strict=True):
        x, y = (y.float(), y.float()) if kind == Kind.sae else (x.float(), y.float())
        out = coder(x, y)
        metrics.update(targets.add(y), out.sae_out, out.latent_acts, out.latent_indices)
    return metrics.result()
