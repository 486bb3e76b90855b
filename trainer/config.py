"""Configuration of `trainer/train.py`. Hydra refuses unknown keys, types and presets.

Each class checks its own numbers. Checks that depend on the kind of coder or on its activation, whose tables can be
extended, are made in run/build.py before a run begins.
"""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from skipcoder.errors import UserError

# Enum members are spelt as users type them (coder.kind=skip_transcoder).


class Kind(StrEnum):
    """The built-in kinds of coder; `KINDS` in coder/coder.py holds all of them."""

    sae = "sae"
    transcoder = "transcoder"
    skip_transcoder = "skip_transcoder"
    crosscoder = "crosscoder"
    clt = "clt"
    skip_clt = "skip_clt"


MLP_KINDS = (Kind.sae, Kind.transcoder, Kind.skip_transcoder)
"""Those that stand in for one MLP."""


class ActivationName(StrEnum):
    """The built-in activations; `ACTIVATIONS` in coder/activations/ holds all of them."""

    topk = "topk"
    groupmax = "groupmax"
    batchtopk = "batchtopk"
    jumprelu = "jumprelu"


class Side(Enum):
    input = "input"
    output = "output"


class SkipInit(Enum):
    zero = "zero"
    ridge = "ridge"


class OptimName(Enum):
    adam = "adam"
    signum = "signum"
    muon = "muon"


class EncodeMode(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    fp8 = "fp8"
    scout = "scout"


@dataclass
class CoderConfig:
    """The sparse coder: what it reads and writes, its size, and how it starts."""

    kind: str = Kind.skip_transcoder
    """sae, transcoder, skip_transcoder, crosscoder, clt, skip_clt, or one of your own (docs/extending.md)."""
    k: int = 32
    """Latents active per token; of a cross-layer transcoder in each layer."""
    width: int = 4608
    """Number of latents; of a cross-layer transcoder in each layer."""
    activation: str = ActivationName.topk
    """topk; groupmax: the largest of each of k equal runs of latents; batchtopk: in training the largest of the batch,
    k per token, afterwards all above a threshold; jumprelu: all above learned thresholds, about k per token."""
    prefixes: list[int] | None = None
    """Matryoshka: sizes of latent prefixes that must also reconstruct by themselves, e.g. [512,2048]."""
    side: Side = Side.output
    """Which side of the MLP an SAE or a crosscoder reconstructs; transcoders read the input and write the output."""
    window: int | None = None
    """Cross-layer transcoder: how many layers on latents write, besides their own; null: to the last."""
    normalize_decoder: bool = True
    """SAE, crosscoder: keep decoder rows at unit norm and remove the gradient along them."""
    skip_init: SkipInit | None = None
    """Skip transcoder: start the skip from the ridge solution of y on x (docs/studies/ridge.md) or from zero (as in
    the paper). null: ridge if the store has enough training tokens (64 per dimension), else zero."""

    @property
    def reconstructs(self) -> bool:
        """Whether it reads what it writes, and is centred by b_pre = b_dec."""
        return self.kind in (Kind.sae, Kind.crosscoder)

    @property
    def over_hookpoints(self) -> bool:
        """Whether it is one coder over several hookpoints."""
        return self.kind == Kind.crosscoder or self.over_layers

    @property
    def over_layers(self) -> bool:
        """Whether it is a coder for each of several layers, which write to later ones."""
        return self.kind in (Kind.clt, Kind.skip_clt)

    @property
    def has_skip(self) -> bool:
        """Whether it has an affine path beside the latents."""
        return self.kind in (Kind.skip_transcoder, Kind.skip_clt)

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 0 or not self.over_layers):
            raise UserError(f"coder.window={self.window}: at least 0, and for cross-layer transcoders alone, or null")
        if self.width < 1:
            raise UserError(f"coder.width={self.width}: must be at least 1")
        if not 1 <= self.k <= self.width:
            raise UserError(f"coder.k={self.k} must be between 1 and coder.width={self.width}; lower k or raise width")
        if self.prefixes is not None and not all(
            a < b for a, b in zip([0, *self.prefixes], [*self.prefixes, self.width], strict=True)
        ):
            raise UserError(f"coder.prefixes={self.prefixes}: must rise from at least 1 to less than coder.width")


@dataclass
class EncodeConfig:
    """How training finds the latents that fire. Their values are float32 in every mode."""

    mode: EncodeMode | None = None
    """float32: exact. bfloat16, fp8, scout (int8, on CPUs): a cheaper product nominates latents, and exact values
    decide. null: the mode known to be fastest on this machine."""
    nominated: float | None = None
    """Latents nominated, as a multiple of k; null: 1.25, with fp8 1.75."""
    chunk_bytes: int | None = None
    """Bytes of pre-activations held at once; null: 64 MiB on CPUs, 2 GiB on GPUs. The last bits may depend on it, so a
    run keeps what it began with."""
    min_recall: float = 0.999
    """If less of the float32 choice is found on a sample, the run switches to the next more exact mode."""

    def __post_init__(self) -> None:
        if self.nominated is not None and self.nominated < 1:
            raise UserError(f"encode.nominated={self.nominated}: must be at least 1")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise UserError(f"encode.chunk_bytes={self.chunk_bytes}: must be at least 1, or null")
        if not 0 <= self.min_recall <= 1:
            raise UserError(f"encode.min_recall={self.min_recall}: must be between 0 and 1")


@dataclass
class LossConfig:
    """Terms added to the reconstruction error."""

    auxk: float = 0.0
    """Weight of AuxK, in which dead latents predict the error (1/32 is usual; 0: off)."""
    multi_topk: bool = False
    """Add 1/8 of the error made with 4 k latents."""
    l0: float = 1.0
    """jumprelu: weight of (latents per token / k - 1)^2."""

    def __post_init__(self) -> None:
        for name in ("auxk", "l0"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name}={getattr(self, name)}: must not be negative")


@dataclass
class OptimConfig:
    """Adam with the paper's recipe (warm-up, then linear to zero), schedule-free signum, or Muon."""

    name: OptimName = OptimName.adam
    """adam, signum or muon."""
    lr: float | None = None
    """Learning rate; null: adam 2e-4 / sqrt(width / 2^14), signum 5e-3 over the same root, muon 2e-3. Short runs of
    Adam need more (1e-3 to 3e-3)."""
    momentum: float = 0.95
    """signum: weight of the average in the point at which gradients are taken; muon: Nesterov momentum."""
    beta1: float = 0.9
    """Adam, which muon uses for the biases: decay of the average gradient."""
    beta2: float = 0.999
    """Adam: decay of the average squared gradient."""
    eps: float = 6.25e-10
    """Adam: added to the root of that average."""
    warmup_steps: int = 1000
    """Steps of warm-up, at most 5 % of the run."""
    clip: float = 1.0
    """Largest gradient norm of one coder, to which it is clipped."""

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise UserError(f"optim.lr={self.lr}: must be positive, or null for the paper's rule")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: must be at least 0 and below 1")
        if not 0 < self.momentum < 1:
            raise UserError(f"optim.momentum={self.momentum}: must be above 0 and below 1")
        for name in ("eps", "clip"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name}={getattr(self, name)}: must be positive")


@dataclass
class StreamConfig:
    """The order of training tokens, and which of them are left out."""

    seed: int = 0
    """Seed of the order of training tokens."""
    pool_chunks: int | None = None
    """Chunks shuffled together; null: as many as hold 512 MiB of pairs."""
    readers: int | None = None
    """Threads that read and decompress, for a GPU processes unless the split is small; null: 2 threads, 32 from an
    object store, or as many processes as there are cores, but at most 16. They do not change the order."""
    first_positions: int = 1
    """Leave out this many positions at the start of each row (attention sinks, BOS)."""
    special_tokens: bool = True
    """Leave out positions that hold one of the tokenizer's special tokens."""
    roles: list[str] | None = None
    """Of conversations (data.chat=true) keep only what these wrote, e.g. [assistant]: system, user, assistant, tool,
    other, template (what the chat template adds), text (of documents that are no conversations). null: all."""
    max_norm: float | None = None
    """Leave out tokens whose MLP input or output is longer than so many medians, e.g. 10 (docs/sweeps.md)."""

    def __post_init__(self) -> None:
        if self.seed < 0 or self.first_positions < 0:
            raise UserError(
                f"stream.seed={self.seed}, stream.first_positions={self.first_positions}: must not be negative"
            )
        if self.max_norm is not None and self.max_norm <= 1:
            raise UserError(f"stream.max_norm={self.max_norm}: must be above 1, or null")
        if self.pool_chunks is not None and self.pool_chunks < 1:
            raise UserError(f"stream.pool_chunks={self.pool_chunks}: must be at least 1, or null")
        if self.readers is not None and self.readers < 1:
            raise UserError(f"stream.readers={self.readers}: must be at least 1, or null")


@dataclass
class StoreRef:
    """The store to read."""

    path: str | None = None
    """Path of the store; null: the only one under stores/."""
    other: str | None = None
    """For a crosscoder between two models: a second store, of the same text (docs/crosscoders.md)."""


@dataclass
class RunConfig:
    """Where results go."""

    dir: str = "???"
    """The run directory; Hydra names those of a sweep's jobs."""


@dataclass
class LoopConfig:
    """The length and the machinery of a run."""

    tokens: int = 10_000_000
    """Tokens to train on, in steps of batch_tokens (an epoch's short last batch counts as a whole one); if the store
    holds fewer, training takes several epochs."""
    batch_tokens: int = 4096
    """Tokens per step, over all processes."""
    micro_batches: int = 1
    """Parts in which a batch goes through the coder, one after another, to save memory."""
    shards: int = 1
    """Processes over which a coder's latents are spread, for coders too wide for one GPU (docs/cluster.md); other
    processes beside them share the tokens."""
    k_start: int | None = None
    """Latents active per token at the start, falling linearly to coder.k over k_anneal of the run; null: coder.k."""
    k_anneal: float = 0.1
    """Share of the run over which k falls from k_start to coder.k."""
    dead_tokens: int | None = None
    """A latent is dead after this many tokens without firing; null: min(10M, tokens / 4)."""
    device: str | None = None
    """Device; null: cuda if there is one, else cpu."""
    threads: int | None = None
    """CPU threads; null: all cores."""
    graph: bool = True
    """On a GPU replay the steps as a CUDA graph where they allow it; the bits are the same."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between evaluations on validation tokens; null: ten per run."""
    eval_tokens: int = 4096
    """Validation tokens to evaluate on during training; 0: none."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard (pip install 'skipcoder[tensorboard]')."""
    wandb: str | None = None
    """Weights & Biases project to which metrics are also written (pip install 'skipcoder[wandb]')."""
    save_every: int = 200
    """Steps between checkpoints from which an interrupted run can resume."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "micro_batches", "shards", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.k_anneal <= 1:
            raise UserError(f"train.k_anneal={self.k_anneal}: must be above 0, at most 1")
        if self.eval_tokens < 0:
            raise UserError(f"train.eval_tokens={self.eval_tokens}: must not be negative")
        for name in ("dead_tokens", "threads", "eval_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)}: must be at least 1, or null")


@dataclass
class TrainConfig:
    """`python trainer/train.py`: train one coder (or, with -m, a sweep) on a store."""

    store: StoreRef = field(default_factory=StoreRef)
    hookpoint: str | None = None
    """Hookpoint to train on; null: the only one of the store. A glob (`layers.*.mlp`, `layers.{4,8}.mlp`) trains a set:
    one coder for each hookpoint that matches, in a folder of its name; a crosscoder or CLT is one over all of them."""
    coder: CoderConfig = field(default_factory=CoderConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    """Seed of the coder's initialisation."""

    def __post_init__(self) -> None:
        k_start, shards = self.train.k_start, self.train.shards
        if self.coder.width % shards:
            raise UserError(f"coder.width={self.coder.width}: must be a multiple of train.shards={shards}")
        if shards > 1 and self.optim.name is OptimName.muon:
            raise UserError("optim=muon needs whole matrices, and train.shards spreads them: use adam or signum")
        if k_start is not None and not self.coder.k <= k_start <= self.coder.width:
            raise UserError(f"train.k_start={k_start}: must be between coder.k and coder.width")
        if self.coder.side is Side.input and not self.coder.reconstructs:
            raise UserError(
                f"coder.side=input is for SAEs and crosscoders; a {self.coder.kind} writes the output: leave it out"
            )
