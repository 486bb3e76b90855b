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
    neuronpedia = "neuronpedia"


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
class NeuronpediaConfig:
    """How latents are called on Neuronpedia."""

    model: str | None = None
    """Its id of the model, such as gemma-2-2b; null: the store's name of it."""
    set: str | None = None
    """The source set; layer 10 is source 10-SET. null: skipcoder-KIND-WIDTH."""
    release: str | None = None
    """The release; null: as the set."""
    description: str | None = None
    """A line about the release and the set."""
    creator: str = ""
    """Whose they are."""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """The creator's id in Neuronpedia's database; this one is what its own exporter falls back on."""


@dataclass
class ExportConfig:
    """`python trainer/export.py`: write coders as another tool's files."""

    run: str | None = None
    """A run directory; the coder is written into `out`."""
    runs: str | None = None
    """A glob of run directories; each coder is written into `out`/HOOKPOINT; circuit_tracer: one run for each layer."""
    format: Target = Target.plain
    out: str = "???"
    topk: TopK | None = None
    """How to write a top-k transcoder to a format that has none (saelens; circuit_tracer where fewer than k latents are
    positive). exact: with classes that skipcoder registers with SAELens. thresholds: latents fire above thresholds
    instead, each as often as it was chosen; the change is measured and written into the metadata."""
    features: bool = False
    """circuit_tracer: also write what its viewer shows of each latent, from the store: where the run's own coder fires,
    whatever `topk` makes of it."""
    store: StoreRef = field(default_factory=StoreRef)
    """Store of activations to compare outputs on; null: the store that the run was trained on."""
    push: str | None = None
    """ORG/NAME on the Hugging Face Hub to upload the folder to."""
    private: bool = False
    """Whether the repository, if new, is private."""
    neuronpedia: NeuronpediaConfig = field(default_factory=NeuronpediaConfig)
    license: str | None = None
    """License of the weights for the model card, e.g. apache-2.0."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.runs is None):
            raise UserError("set run=DIR, or runs=GLOB for several")
        if self.features and self.format is not Target.circuit_tracer:
            raise UserError(f"features=true is for format=circuit_tracer, not {self.format.value}")
        if self.topk is TopK.exact and self.format is not Target.saelens:
            raise UserError(f"topk=exact is for format=saelens, not {self.format.value}")


@dataclass
class ImportConfig:
    """`python trainer/import_coder.py`: make another tool's coder a run directory, to evaluate and interpret."""

    source: str = "???"
    """A folder, or ORG/NAME on the Hugging Face Hub."""
    revision: str | None = None
    """Revision of the Hub's repository."""
    subfolder: str | None = None
    """Folder in `source`, e.g. layers.10.mlp or layer_12/width_16k/average_l0_82."""
    format: str | None = None
    """null: recognised from the files."""
    store: StoreRef = field(default_factory=StoreRef)
    """A store of the coder's model."""
    hookpoint: str | None = None
    """null: the only hookpoint of the store."""
    side: Side | None = None
    """SAE: the side of the MLP that it reads; null: the side with the lower FVU on validation text."""
    layer: int | None = None
    """circuit_tracer: the layer to import."""
    transcoder: bool | None = None
    """gemma_scope: whether params.npz holds a transcoder; null: validation FVU decides."""
    subtract_decoder_bias: bool | None = None
    """sparsify: whether a transcoder subtracts b_dec from what it reads; null: validation FVU decides."""
    first_positions: int = 1
    """Number of positions at the start of each row that the coder is not meant for."""
    special_tokens: bool = True
    """Whether it is also not meant for the tokenizer's special tokens."""
    run: RunConfig = field(default_factory=RunConfig)
    device: str | None = None
    """cuda, cuda:N or cpu; null: cuda if there is one, else cpu."""
