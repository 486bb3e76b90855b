"""Configuration of `pipeline/cache.py`. Hydra refuses unknown keys and presets, and wrong types.

Each class checks its own numbers. Names from a table that can be extended (`data.kind`, `store.codec`) are looked up
in it when a capture begins.
"""

import re
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from skipcoder.errors import UserError

# Enum members are spelt as users type them (model.dtype=bfloat16).


class Dtype(Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def bytes(self) -> int:
        """Bytes of a number."""
        return 4 if self is Dtype.float32 else 2


class Compression(Enum):
    zstd = "zstd"
    lz4 = "lz4"


class Quantization(Enum):
    int8 = "int8"
    int4 = "int4"

    @property
    def bytes(self) -> float:
        """Bytes of a weight."""
        return 1.0 if self is Quantization.int8 else 0.5


class DeviceMap(Enum):
    auto = "auto"


class SourceKind(StrEnum):
    """The built-in sources; `SOURCES` in text/sources.py holds all of them."""

    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    huggingface = "huggingface"
    mix = "mix"


@dataclass
class ModelConfig:
    """The language model whose MLPs are read."""

    name: str = "???"
    """Short name, used for default paths and in reports; `local` becomes that of the folder or hub id."""
    id: str = "???"
    """Hub id, directory, or `package:NAME` for weights inside an installed Python package."""
    revision: str | None = None
    """Revision on the hub: a branch, tag or commit."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `id`, when the weights are not safetensors."""
    dtype: Dtype = Dtype.bfloat16
    """Type in which the model runs: bfloat16, float16, float32."""
    quantization: Quantization | None = None
    """int8 or int4: hold linear layers' weights so, by transformers and bitsandbytes; activations stay in `dtype`."""
    device_map: DeviceMap | None = None
    """auto: spread the weights over all GPUs that are visible, then memory, then `offload_folder`, by transformers and
    accelerate. The bits are those of one device of the same kind."""
    max_memory: dict[str, str] = field(default_factory=dict)
    """With `device_map`: most to use of each, e.g. {gpu0: 20GiB, cpu: 60GiB}; by default what is free."""
    offload_folder: str | None = None
    """With `device_map`: where weights go that fit nowhere else; each layer is read when it is needed."""
    attention: str | None = None
    """transformers' `attn_implementation`; null: sdpa, or eager where the model has no sdpa."""
    shuffle: int | None = None
    """Seed for permuting the entries of every weight matrix: a control, a model that has learned nothing but whose
    weights keep their distribution."""
    hookpoints: list[str] = field(default_factory=list)
    """Default hookpoints of this model: module names, globs allowed (`layers.*.mlp`)."""
    write_modules: dict[str, str] = field(default_factory=dict)
    """Hookpoint glob -> module whose output is captured, if that is not the hooked module itself;
    `*` in the value stands for what `*` in the key matched. Gemma-2's MLP output passes through
    `post_feedforward_layernorm` before it enters the residual stream."""

    def __post_init__(self) -> None:
        for name in ("max_memory", "offload_folder"):
            if getattr(self, name) and self.device_map is None:
                raise UserError(f"model.{name} needs model.device_map=auto")
        for place in self.max_memory:
            if re.fullmatch(r"gpu\d+|cpu", place) is None:
                raise UserError(f"model.max_memory: {place!r} is neither cpu nor gpu0, gpu1, ...")
        if self.quantization is not None and self.gguf_file is not None:
            raise UserError("model.quantization is for unquantised weights, not for model.gguf_file")
        if self.device_map is not None and self.shuffle is not None:
            raise UserError("model.shuffle permutes weights in memory, so it goes without model.device_map")
        if self.name == "local" and self.id != "???":
            self.name = self.id.rstrip("/").rpartition("/")[2].strip(".") or "local"


@dataclass
class SourceConfig:
    """One source of a mixture."""

    weight: float = 1.0
    """Its share of the tokens, beside the others' weights."""
    kind: str = SourceKind.jsonl
    """As in `data`; so are the others."""
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f"data.sources: weight={self.weight} must be above 0")


@dataclass
class DataConfig:
    """The text, and how it is cut into rows of tokens."""

    kind: str = SourceKind.stdlib
    """stdlib, text, jsonl, parquet, huggingface, mix, or one of your own (docs/extending.md)."""
    path: str | None = None
    """File, directory or glob for text, jsonl and parquet; dataset id for huggingface."""
    sources: list[SourceConfig] = field(default_factory=list)
    """mix: the sources, each with a weight: its share of the tokens."""
    subset: str | None = None
    """huggingface: the configuration of the data set."""
    split: str = "train"
    """huggingface: the split of the data set."""
    revision: str | None = None
    """huggingface: a branch, tag or commit."""
    field: str | None = None
    """Column or key that holds the text (jsonl, parquet, huggingface); null: text or, of conversations, messages."""
    chat: bool = False
    """Whether documents are conversations, lists of {role, content}, which the tokenizer's chat template puts into
    words (docs/models.md)."""
    chat_template: str | None = None
    """File with a chat template, for tokenizers that have none."""
    tokens: int = 131072
    """Tokens to capture; rounded up to whole rows."""
    context: int = 256
    """Tokens in a row."""
    repeat: bool = False
    """Restart the source when it ends early (otherwise an error)."""
    separate: bool = False
    """Whether the documents of a row attend only to themselves. Each then begins with BOS (or the end-of-text token) at
    position 0, and so does every row."""
    held_out_rows: int | None = None
    """Rows that one document gives to validation and to test at most; null: all of it. Where documents are long, fewer
    rows of each make held-out text of more documents, which is what intervals need."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"data.tokens={self.tokens}: ask for at least 1 token")
        if self.context < 2:
            raise UserError(f"data.context={self.context}: a row needs at least 2 tokens")
        if self.held_out_rows is not None and self.held_out_rows < 1:
            raise UserError(f"data.held_out_rows={self.held_out_rows}: must be at least 1, or null for no limit")

    @property
    def column(self) -> str:
        """Column or key to read."""
        return self.field or ("messages" if self.chat else "text")

    @property
    def has_chat(self) -> bool:
        """Whether any document is a conversation."""
        return self.chat or any(source.chat for source in self.sources)


@dataclass
class StoreConfig:
    """Where and how activations are stored."""

    path: str = "???"
    """A directory, or `s3://bucket/name.zarr`, `gs://...`."""
    codec: str = "bf16"
    """bf16: 2 bytes per activation before compression, lossless for a model in bfloat16; int8, fp8: 1 byte; or one of
    your own (docs/extending.md)."""
    compression: Compression | None = None
    """zstd: smaller; lz4: for processors that are slow at zstd. null: what the store has, zstd if it is new."""
    unit_rows: int | None = None
    """Token rows in one unit of work (= one shard of every array). null: min(16384/context, rows/64)."""

    def __post_init__(self) -> None:
        if self.unit_rows is not None and self.unit_rows < 1:
            raise UserError(f"store.unit_rows={self.unit_rows}: must be at least 1, or null to choose it")


@dataclass
class RayConfig:
    """How the capture is distributed. Among machines of one kind none of this changes a byte of the store."""

    address: str | None = None
    """null: start Ray on this machine; `auto` or an address: join that cluster."""
    workers: int = 1
    """Copies of the model that run at once."""
    cpus_per_worker: int | None = None
    """null: all cores divided by the number of workers, at most those of one machine."""
    gpus_per_worker: float | None = None
    """null: one if Ray has GPUs, else none. Several hold one copy of the model together (model.device_map=auto)."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources that a worker requires, to place workers on the machines that offer them."""
    writers: int | None = None
    """Units that a worker has in hand at once: the model runs over one while the others are compressed and written.
    Each takes memory for its activations. null: 4 with a GPU, else 1, as the model alone keeps CPUs busy."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"ray.workers={self.workers}: must be at least 1")
        if self.writers is not None and self.writers < 1:
            raise UserError(f"ray.writers={self.writers}: must be at least 1, or null")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise UserError(f"ray.cpus_per_worker={self.cpus_per_worker}: must be at least 1, or null")


@dataclass
class CacheConfig:
    """`python pipeline/cache.py`: capture MLP input/output pairs into a store."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    hookpoints: list[str] = field(default_factory=list)
    """Names of modules of the model without its head, globs allowed; the default is the model preset's. Inputs and
    outputs are captured, of `layers.*:output` the outputs alone."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass. Part of the store's identity: a different value may change low bits. null: what the
    store has; if it is new, 4,096, or 16,384 where workers have a GPU."""
    plan: bool = False
    """Only print tokens, bytes, time and the number of coders from which caching pays off."""
    seed: int = 0
    """Seed of the permutation of tokens within each unit."""

    def __post_init__(self) -> None:
        if not self.hookpoints:
            raise UserError("hookpoints is empty: name modules, for example hookpoints='[layers.10.mlp]'")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must not be negative")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise UserError(f"micro_batch_tokens={self.micro_batch_tokens}: must be at least 1")
