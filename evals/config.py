"""Configuration of `evals/evaluate.py`."""

from dataclasses import dataclass

from skipcoder.pipeline.errors import UserError


@dataclass
class EvaluateConfig:
    """Evaluate one run, or all that a glob matches, on the held-out units of their store."""

    run: str | None = None
    """A run directory."""
    runs: str | None = None
    """A glob of run directories: one model load, one table, one report."""
    out: str | None = None
    """With `runs`: the table, NAME.json; NAME.parquet and report.html are written beside it."""
    ce_tokens: int = 4096
    """Held-out tokens on which the language model runs: whole rows, spread evenly over all of them."""
    batch_rows: int = 4
    """Token rows per forward pass of the language model."""
    device: str | None = None

    def __post_init__(self) -> None:
        if (self.run is None) == (self.runs is None):
            raise UserError("set either run=DIR or runs='GLOB'")
        if self.out is not None and self.runs is None:
            raise UserError("out=FILE goes with runs='GLOB'; a single run's result is written into its directory")
        if self.out is not None and not self.out.endswith(".json"):
            raise UserError(f"out={self.out}: name a file that ends in .json")
        for name in ("ce_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
