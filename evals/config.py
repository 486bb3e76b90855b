"""Configuration of `evals/evaluate.py`."""

from dataclasses import dataclass, field
from enum import Enum

from skipcoder.pipeline.errors import UserError


class Task(Enum):
    core = "core"
    probing = "probing"
    absorption = "absorption"
    tpp = "tpp"
    scr = "scr"
    ravel = "ravel"


class Control(Enum):
    neurons = "neurons"
    affine = "affine"


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            section = type(config).__name__.removesuffix("Config").lower()
            key = name if section == "evaluate" else f"{section}.{name}"
            raise UserError(f"{key}={getattr(config, name)}: must be at least {least}")


@dataclass
class ProbingConfig:
    """Sparse probing of labelled texts."""

    datasets: list[str] | None = None
    """Names in sae-probes or paths of CSV files (columns prompt, target); [all]: the 113 binary ones; null: `count` of
    them, spread over the list."""
    count: int = 16
    texts: int = 600
    """Of each data set, two thirds of them for training."""
    tokens: int = 64
    """Of each text."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 5])
    """Latents that a probe reads."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "count", "tokens")
        _at_least(self, 24, "texts")
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"probing.ks={self.ks}: numbers of latents, 1 or more")


@dataclass
class AbsorptionConfig:
    """Feature absorption and splitting on the first-letter task."""

    words: int = 4000
    """Of the vocabulary, half of them for the probes."""
    examples: int = 5
    """Of spelling, before each word."""

    def __post_init__(self) -> None:
        _at_least(self, 200, "words")
        _at_least(self, 0, "examples")


@dataclass
class ErasureConfig:
    """Ablation of a concept's latents: TPP and SCR."""

    tpp_data: str = "97_news_class"
    """Name in sae-probes or path of a CSV file (columns prompt, target), of two classes or more."""
    scr_csv: str | None = None
    """CSV file with columns prompt, target and spurious; null: historical figures, politicians and men."""
    texts: int = 1000
    tokens: int = 64
    ablate: list[int] = field(default_factory=lambda: [2, 5, 10, 20, 50, 100, 500])
    """Latents ablated; numbers of at least the width are left out."""

    def __post_init__(self) -> None:
        _at_least(self, 64, "texts")
        _at_least(self, 1, "tokens")
        if not self.ablate or min(self.ablate) < 1:
            raise UserError(f"erasure.ablate={self.ablate}: numbers of latents, 1 or more")


@dataclass
class RavelConfig:
    """Disentanglement of cities' attributes."""

    pairs: int = 200
    """For each attribute, and as many that ask for others; 70 % teach the mask."""
    steps: int = 60
    batch: int = 16

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch")
        _at_least(self, 24, "pairs")


@dataclass
class EvaluateConfig:
    """Evaluate one run, or all that a glob matches, on the held-out units of their store."""

    run: str | None = None
    """A run directory."""
    runs: str | None = None
    """A glob of run directories: one model load, one table, one report."""
    out: str | None = None
    """With `runs`: the table, NAME.json; NAME.parquet, NAME.seeds.json and report.html are written beside it."""
    tasks: list[Task] = field(default_factory=lambda: [Task.core])
    """core: reconstruction and cross-entropy; probing, absorption, tpp, scr, ravel: SAEBench's, for both sides."""
    controls: list[Control] = field(default_factory=list)
    """With `out`: rows of the table for what is no coder. neurons: the MLP's own, the k largest, for each k of the
    runs; affine: the best affine map from input to output."""
    together: bool = False
    """With `out`: also splice all hookpoints' coders of the same kind and size at once (NAME.together.json)."""
    saebench: str | None = None
    """Folder for results in SAEBench's JSON form."""
    ce_tokens: int = 4096
    """Held-out tokens on which the language model runs: whole rows, spread evenly over all of them."""
    intervals: bool = True
    """95 % intervals, for which cross-entropy needs eight rows or more."""
    batch_rows: int = 4
    """Token rows per forward pass of the language model."""
    device: str | None = None
    probing: ProbingConfig = field(default_factory=ProbingConfig)
    absorption: AbsorptionConfig = field(default_factory=AbsorptionConfig)
    erasure: ErasureConfig = field(default_factory=ErasureConfig)
    ravel: RavelConfig = field(default_factory=RavelConfig)

    def __post_init__(self) -> None:
        if (self.run is None) == (self.runs is None):
            raise UserError("set either run=DIR or runs='GLOB'")
        if self.out is not None and self.runs is None:
            raise UserError("out=FILE goes with runs='GLOB'; a single run's result is written into its directory")
        if self.out is not None and not self.out.endswith(".json"):
            raise UserError(f"out={self.out}: name a file that ends in .json")
        if (self.controls or self.together) and self.out is None:
            raise UserError("controls and together are written into a table: set out=FILE.json")
        if not self.tasks:
            raise UserError(f"tasks=[]: name some of {', '.join(task.value for task in Task)}")
        _at_least(self, 1, "ce_tokens", "batch_rows")
