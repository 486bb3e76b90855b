"""Metrics for TensorBoard, as `train.tensorboard=true` asks."""

from pathlib import Path
from typing import Any

from skipcoder.pipeline.errors import UserError


class Board:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("train.tensorboard=true needs: pip install 'skipcoder[tensorboard]'") from None
        self._make, self._folder = SummaryWriter, directory / "tensorboard"
        self._writer: Any = None
        self._purge: int | None = None

    def go_on_after(self, step: int) -> None:
        """Steps above `step` that an interrupted run has written will be hidden."""
        self._purge = step + 1

    def write(self, line: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, nested ones as `ms/read`."""
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=self._purge)
        for key, value in line.items():
            for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, int | float):
                    self._writer.add_scalar(f"{key}/{name}".rstrip("/"), number, line["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()
