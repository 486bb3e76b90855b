"""Write metrics also to TensorBoard (`train.tensorboard=true`) and Weights & Biases (`train.wandb=PROJECT`)."""

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from omegaconf import OmegaConf

from skipcoder.errors import UserError
from skipcoder.trainer.config import TrainConfig


class Logger(Protocol):
    """A destination for lines of metrics."""

    def go_on_after(self, step: int) -> None:
        """Resume after `step`: later steps that the interrupted run wrote will be written again."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line of metrics.jsonl, nested ones under names like `ms/read`."""

    def close(self, finished: bool) -> None:
        """Write what is still in memory; `finished`: whether the run is complete."""


def loggers(cfg: TrainConfig, directory: Path) -> list[Logger]:
    """Return the loggers that the configuration asks for."""
    asked: list[Logger] = []
    if cfg.train.tensorboard:
        asked.append(TensorBoard(directory))
    if cfg.train.wandb:
        asked.append(Wandb(cfg, directory))
    return asked


class TensorBoard:
    """Writes event files to the run's folder tensorboard/."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("train.tensorboard=true needs: pip install 'skipcoder[tensorboard]'") from None
        self._make, self._folder = SummaryWriter, directory / "tensorboard"
        self._writer: Any = None
        self._purge: int | None = None

    def go_on_after(self, step: int) -> None:
        self._purge = step + 1

    def write(self, line: Mapping[str, Any]) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=self._purge)
        for name, number in _numbers(line):
            self._writer.add_scalar(name, number, line["step"])

    def close(self, finished: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """Keeps one W&B run for each run directory, under its name. Account, mode and host are W&B's own settings
    (`wandb login`, WANDB_MODE=offline, ...)."""

    def __init__(self, cfg: TrainConfig, directory: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("train.wandb needs: pip install 'skipcoder[wandb]'") from None
        folder = directory / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / "run-id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        try:
            # create_new: the members of a bank are concurrent runs in one process.
            self._run = wandb.init(
                project=cfg.train.wandb,
                id=identity.read_text(),
                name=directory.name,
                dir=directory,
                config=cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)),
                resume="allow",
                reinit="create_new",
            )
        except wandb.Error as error:
            raise UserError(f"train.wandb={cfg.train.wandb}: {error}; `wandb login`, or WANDB_MODE=offline") from None

    def go_on_after(self, step: int) -> None:
        # W&B drops steps that it already has; a resumed run gives the same numbers, so nothing is lost.
        pass

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(_numbers(line)), step=line["step"])

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float):
                yield f"{key}/{name}".rstrip("/"), number
