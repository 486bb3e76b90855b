"""Configuration of `trainer/export.py` and `trainer/import_coder.py`."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from skipcoder.errors import UserError
from skipcoder.trainer.config import RunConfig, Side, StoreRef


class Target(Enum):
    plain = "plain"
    sparsify = "sparsify"
    saelens = "saelens"
    circuit_tracer = "circuit_tracer"
    delphi = "delphi"


class Source(StrEnum):
    plain = "plain"
    sparsify = "sparsify"
    saelens = "saelens"
    circuit_tracer = "circuit_tracer"
    gemma_scope = "gemma_scope"


class TopK(Enum):
    exact = "exact"
    thresholds = "thresholds"


@dataclass
class ExportConfig:
    """`python trainer/export.py`: coders as another tool's files."""

    run: str | None = None
    """A run directory; the coder is written into `out`."""
    runs: str | None = None
    """A glob of run directories, each coder is written into `out`/HOOKPOINT; circuit_tracer: one run for each layer."""
    format: Target = Target.plain
    out: str = "???"
    topk: TopK | None = None
    """How a format that has no top-k transcoders (saelens; circuit_tracer where fewer than k latents are positive)
    holds one. exact: by classes that skipcoder registers with SAELens. thresholds: latents fire above thresholds
    instead, each as often as it was chosen; what that changes is measured and written into the metadata."""
    store: StoreRef = field(default_factory=StoreRef)
    """Activations that outputs are compared on; null: the store that the run was trained on."""
    push: str | None = None
    """ORG/NAME on the Hugging Face Hub to upload the folder to."""
    private: bool = False
    """Whether the repository, if it is new, is private."""
    license: str | None = None
    """Of the weights, for the model card, as apache-2.0."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.runs is None):
            raise UserError("set run=DIR, or runs=GLOB for several")
        if self.topk is TopK.exact and self.format is not Target.saelens:
            raise UserError(f"topk=exact is for format=saelens, not {self.format.value}")


@dataclass
class ImportConfig:
    """`python trainer/import_coder.py`: another tool's coder as a run directory, to evaluate and interpret."""

    source: str = "???"
    """A folder, or ORG/NAME on the Hugging Face Hub."""
    revision: str | None = None
    """Of the Hub's repository."""
    subfolder: str | None = None
    """In source, as layers.10.mlp or layer_12/width_16k/average_l0_82."""
    format: Source | None = None
    """null: as the files look."""
    store: StoreRef = field(default_factory=StoreRef)
    """A store of the model that the coder is of."""
    hookpoint: str | None = None
    """null: the only hookpoint of the store."""
    side: Side | None = None
    """Of an SAE: the side of the MLP that it reads; null: the one on which its held-out FVU is lower."""
    layer: int | None = None
    """circuit_tracer: which of its layers."""
    transcoder: bool | None = None
    """gemma_scope: whether the file is a transcoder's; null: as the held-out FVU says."""
    subtract_decoder_bias: bool | None = None
    """sparsify: whether a transcoder subtracts b_dec from what it reads; null: as the held-out FVU says."""
    first_positions: int = 1
    """The coder is not for so many positions at the start of each row."""
    special_tokens: bool = True
    """Nor for positions that hold one of the tokenizer's special tokens."""
    run: RunConfig = field(default_factory=RunConfig)
    device: str | None = None
