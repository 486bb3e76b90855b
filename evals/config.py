"""Configuration of the programs of evals/."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from skipcoder.errors import UserError


class TaskName(StrEnum):
    """The built-in evaluations; `TASKS` in tasks/registry.py holds all of them."""

    core = "core"
    probing = "probing"
    absorption = "absorption"
    tpp = "tpp"
    scr = "scr"
    ravel = "ravel"
    contextfree = "contextfree"
    diff = "diff"


class Control(Enum):
    neurons = "neurons"
    affine = "affine"


def at_least(config: object, least: float, *names: str) -> None:
    """Raise UserError for a field of a configuration that is less."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            section = type(config).__name__.removesuffix("Config").lower()
            key = name if section in ("evaluate", "interpret", "scaling", "circuit") else f"{section}.{name}"
            raise UserError(f"{key}={value}: must be at least {least}")


@dataclass
class ProbingConfig:
    """Sparse probing of labelled texts."""

    datasets: list[str] | None = None
    """Names of data sets in sae-probes, or paths of CSV files (columns prompt, target); [all]: the 113 binary ones;
    null: `count` of these, spread over the list."""
    count: int = 20
    """Data sets, where `datasets` names none."""
    texts: int = 600
    """Texts per data set; two thirds of them train the probes."""
    tokens: int = 64
    """Tokens read of each text."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 5])
    """Numbers of latents that a probe reads."""

    def __post_init__(self) -> None:
        at_least(self, 1, "count", "tokens")
        at_least(self, 24, "texts")
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"probing.ks={self.ks}: numbers of latents, 1 or more")


@dataclass
class AbsorptionConfig:
    """Feature absorption and splitting on the first-letter task."""

    words: int = 4000
    """Words of the vocabulary to use; half of them fit the probes."""
    examples: int = 5
    """Spelling examples before each word."""

    def __post_init__(self) -> None:
        at_least(self, 200, "words")
        at_least(self, 0, "examples")


@dataclass
class ContextFreeConfig:
    """How far activations follow from the tokens at hand."""

    tokens: int = 262144
    """Tokens of training text that make the tables, and of test text that try them, at most."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tokens")


@dataclass
class ErasureConfig:
    """Ablation of a concept's latents: TPP and SCR."""

    tpp_data: str = "97_news_class"
    """A data set in sae-probes, or the path of a CSV file (columns prompt, target), with two classes or more."""
    scr_csv: str | None = None
    """CSV file with columns prompt, target and spurious; null: historical figures, politician or not, male or not."""
    texts: int = 1000
    """Texts at most."""
    tokens: int = 64
    """Tokens read of each text."""
    ablate: list[int] = field(default_factory=lambda: [2, 5, 10, 20, 50, 100, 500])
    """Numbers of latents to ablate; those not below the width are left out."""

    def __post_init__(self) -> None:
        at_least(self, 64, "texts")
        at_least(self, 1, "tokens")
        if not self.ablate or min(self.ablate) < 1:
            raise UserError(f"erasure.ablate={self.ablate}: numbers of latents, 1 or more")


@dataclass
class RavelConfig:
    """Disentanglement of cities' attributes."""

    pairs: int = 200
    """Pairs for each attribute, and as many for the others; 70 % of them, on 70 % of the cities, train the mask."""
    steps: int = 60
    """Training steps of the mask."""
    batch: int = 16
    """Pairs per step."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch")
        at_least(self, 24, "pairs")


@dataclass
class ShareConfig:
    """Over which GPUs runs are dealt, as Ray tasks; neither set: none."""

    address: str | None = None
    """An existing Ray cluster (`auto` or an address); null: a Ray of our own, if `tasks` is set."""
    tasks: int | None = None
    """Tasks; null: one for each GPU."""

    def __post_init__(self) -> None:
        if self.tasks is not None and self.tasks < 1:
            raise UserError(f"ray.tasks={self.tasks}: must be at least 1")

    @property
    def is_set(self) -> bool:
        """Whether to use Ray."""
        return self.address is not None or self.tasks is not None


@dataclass
class EvaluateConfig:
    """Evaluate one run, or all that a glob matches, on the test split of their store."""

    run: str | None = None
    """A run directory; or a folder of runs, one for each hookpoint, which is evaluated as runs='DIR/*',
    out=DIR/set.json, together=true."""
    runs: str | None = None
    """A glob of run directories: one model load, one table, one report."""
    out: str | None = None
    """With `runs`: the table, NAME.json; NAME.parquet, NAME.seeds.json and report.html are written beside it."""
    tasks: list[str] = field(default_factory=lambda: [str(TaskName.core)])
    """core: reconstruction and cross-entropy; probing, absorption, tpp, scr, ravel: SAEBench's, for both sides of
    an MLP; contextfree: how far latents follow from the tokens at hand; or your own (docs/extending.md)."""
    controls: list[Control] = field(default_factory=list)
    """With `out`: rows of the table to compare coders with. neurons: the k largest of the MLP's own neurons, for each k
    of the runs; affine: the best affine map from input to output."""
    together: bool = False
    """With `out`: also splice the coders of one kind and size at all hookpoints at once (NAME.together.json)."""
    saebench: str | None = None
    """Folder for results in SAEBench's JSON form."""
    ce_tokens: int | None = None
    """Test tokens on which the language model runs: whole rows, spread evenly over the split. null: 4,096, but at least
    24 rows."""
    every_position: bool = False
    """Also measure with positions spliced that training left out (keys that end in `_all`, `by_position`): the language
    model then runs twice as often."""
    intervals: bool = True
    """95 % intervals over documents, where there are 20 or more, and paired differences between coders."""
    batch_rows: int = 4
    """Token rows per forward pass of the language model."""
    device: str | None = None
    """cuda, cuda:N or cpu; null: cuda if there is one, else cpu."""
    probing: ProbingConfig = field(default_factory=ProbingConfig)
    absorption: AbsorptionConfig = field(default_factory=AbsorptionConfig)
    erasure: ErasureConfig = field(default_factory=ErasureConfig)
    ravel: RavelConfig = field(default_factory=RavelConfig)
    contextfree: ContextFreeConfig = field(default_factory=ContextFreeConfig)
    ray: ShareConfig = field(default_factory=ShareConfig)

    def __post_init__(self) -> None:
        if (self.run is None) == (self.runs is None):
            raise UserError("set either run=DIR or runs='GLOB'")
        if self.out is not None and self.runs is None:
            raise UserError(
                "out=FILE goes with runs='GLOB' (of a set: runs='DIR/*'); a run's result is written into its directory"
            )
        if self.out is not None and not self.out.endswith(".json"):
            raise UserError(f"out={self.out}: name a file that ends in .json")
        if (self.controls or self.together) and self.out is None:
            raise UserError("controls and together are written into a table: set out=FILE.json")
        if not self.tasks:
            raise UserError(f"tasks=[]: name some of {', '.join(TaskName)}")
        at_least(self, 1, "ce_tokens", "batch_rows")


@dataclass
class ScalingConfig:
    """Fit how errors depend on k, width and training tokens to the evaluated runs of a sweep, and predict others."""

    runs: str = "???"
    """A glob of run directories that were evaluated: 20 or more of a kind, with three values of k and of width."""
    against: str | None = None
    """A glob of further evaluated runs, which are not fitted: predictions beside what was measured."""
    predict: str | None = None
    """A run to predict, 'k=64 width=65536 tokens=1e9'; several with commas between them."""
    compute: float | None = None
    """Operations of a whole training run: for each k of the runs, the best width and number of tokens."""
    memory_gib: float | None = None
    """Memory of a GPU for one coder in training: the same, among the widths that fit."""
    tokens: float | None = None
    """Training tokens that there are, for compute and memory_gib; null: as many as compute allows or, without it, as
    the longest run had."""
    out: str | None = None
    """What was printed, as NAME.json, and a figure beside it, NAME.svg."""

    def __post_init__(self) -> None:
        at_least(self, 1, "compute", "tokens")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise UserError(f"memory_gib={self.memory_gib}: must be above 0")
        if self.tokens is not None and self.compute is None and self.memory_gib is None:
            raise UserError(
                "tokens goes with compute or memory_gib; for one prediction write predict='k= width= tokens='"
            )
        if self.out is not None and not self.out.endswith(".json"):
            raise UserError(f"out={self.out}: name a file that ends in .json")


class Negatives(Enum):
    random = "random"
    cofiring = "cofiring"
    similar = "similar"


@dataclass
class ExamplesConfig:
    """The windows of text that show what a latent does."""

    window: int = 32
    """Tokens per window."""
    train: int = 20
    """Windows that the explainer sees."""
    top_share: float = 0.5
    """Share of `train` with the largest activations; the others come from all quantiles."""
    test: int = 25
    """Windows in which the latent fires, and as many in which it does not, that test an explanation."""
    quantiles: int = 10
    """Equal parts of a latent's windows, by activation, from which examples come."""
    negatives: Negatives = Negatives.random
    """random; cofiring: windows of latents that often fire with this one; similar: windows of similar words."""
    neighbours: int = 5
    """cofiring: latents whose windows are taken."""
    pool: int = 2000
    """Windows searched for similar ones."""

    def __post_init__(self) -> None:
        at_least(self, 2, "window", "test")
        at_least(self, 1, "train", "quantiles", "neighbours", "pool")
        if not 0 <= self.top_share <= 1:
            raise UserError(f"examples.top_share={self.top_share}: must be between 0 and 1")


@dataclass
class JudgeConfig:
    """The language model that explains latents and scores explanations, behind OpenAI's chat API."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """For example http://127.0.0.1:8000/v1 (vLLM) or https://openrouter.ai/api/v1."""
    model: str | None = None
    """The model's name on the server; null: no judge, and pages without explanations."""
    cache: str | None = None
    """File that keeps all answers; null: judge.sqlite beside the run directories."""
    embedding_model: str | None = None
    """Model for the scorer `embedding`; null: `model`."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    concurrency: int = 16
    """Questions in flight at once."""
    attempts: int = 6
    """Attempts per question while the server is busy or fails."""
    timeout: float = 120.0
    """Seconds for one answer."""
    logprobs: bool = True
    """Ask for the probabilities of answers, where the server gives them."""
    price_in: float = 0.0
    """Price of a million prompt tokens."""
    price_out: float = 0.0
    """Price of a million answer tokens."""

    def __post_init__(self) -> None:
        at_least(self, 1, "concurrency", "attempts")
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"judge.base_url={self.base_url}: must begin with http:// or https://")
        if self.timeout <= 0:
            raise UserError(f"judge.timeout={self.timeout}: must be positive")


class Draw(Enum):
    random = "random"
    density = "density"


class Scorer(Enum):
    detection = "detection"
    fuzzing = "fuzzing"
    embedding = "embedding"
    simulation = "simulation"
    intervention = "intervention"


@dataclass
class InterpretConfig:
    """Explain latents with a judge, score the explanations, and make pages of them."""

    run: str | None = None
    """A run directory."""
    runs: str | None = None
    """A glob of run directories."""
    latents: int | None = 100
    """Number of latents per run, of those that fire; null: all."""
    draw: Draw = Draw.random
    """How they are chosen: at random, or those that fire on most tokens (density)."""
    which: list[int] | None = None
    """The latents to explain, instead of a draw."""
    circuit: str | None = None
    """The circuit.json of a prompt: the most influential of a run's latents in it, instead of a draw."""
    seed: int = 0
    """Seed of the draw."""
    scorers: list[Scorer] = field(default_factory=lambda: [Scorer.detection, Scorer.fuzzing])
    """detection, fuzzing, embedding, simulation, intervention (docs/interpretation.md)."""
    shown: int = 5
    """Windows in one question."""
    out: str | None = None
    """With `runs`: a table of all runs, NAME.json."""
    pages: bool = True
    """Write RUN/features/index.html."""
    device: str | None = None
    """cuda, cuda:N or cpu; null: cuda if there is one, else cpu."""
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    ray: ShareConfig = field(default_factory=ShareConfig)

    def __post_init__(self) -> None:
        if (self.run is None) == (self.runs is None):
            raise UserError("set either run=DIR or runs='GLOB'")
        if self.latents is not None and self.latents < 1:
            raise UserError(f"latents={self.latents}: must be at least 1, or null for all")
        at_least(self, 1, "shown")
        if self.which is not None and self.circuit is not None:
            raise UserError("set either which=[...] or circuit=FILE")
        if not self.scorers:
            raise UserError(f"scorers=[]: name some of {', '.join(s.value for s in Scorer)}")


@dataclass
class ExploreConfig:
    """`python evals/explore.py`: a coder in its language model, in the browser."""

    run: str = "???"
    """Run directory of the coder."""
    port: int = 8765
    """Port on this machine; 0: any free one."""
    device: str | None = None
    """Device; null: cuda if there is one, else cpu."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UserError(f"port={self.port}: must be between 0 and 65535")
