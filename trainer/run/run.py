"""A run's directory: config.yaml, metrics.jsonl, checkpoint/ and, once it is finished, summary.json."""

import glob
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
import torch
from natsort import natsorted
from omegaconf import OmegaConf
from torch import Tensor
from typing_extensions import TypedDict
from yaml import YAMLError

from skipcoder.errors import UserError
from skipcoder.files import write_atomically
from skipcoder.pipeline.model.sites import Site
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.records import checked
from skipcoder.settings import differences, flat
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.cross_layer import CrossLayerTranscoder
from skipcoder.trainer.coder.files import FOLDER, TENSORS, find_tensors
from skipcoder.trainer.data.batch import Column
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.outliers import in_store
from skipcoder.trainer.data.reading import roles_of

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"

# Keys that may differ between a run and its resumption: they do not change what is learned.
_FREE_KEYS = (
    "run",
    "train.device",
    "train.threads",
    "train.save_every",
    "train.graph",
    "train.shards",
    "train.tensorboard",
    "train.wandb",
    "stream.readers",
)
_SEEDS = ("seed", "stream.seed")


_RETIRED = {"encode.chunk_elements": 2**24}
"""Keys of older configurations, and the values with which they mean what is now the default."""


class SideSummary(TypedDict):
    """How a crosscoder's training ended on one of its sides."""

    hookpoint: str
    side: str
    train_fvu: float
    validation_fvu: float | None


class Summary(TypedDict):
    """summary.json: what was trained, and how it ended. Imported coders and controls lack some keys."""

    kind: str
    k: int
    width: int
    activation: NotRequired[str]
    side: NotRequired[str]
    hookpoint: str
    sides: NotRequired[list[SideSummary]]
    model: str
    seed: int | None
    train_tokens: int | None
    steps: NotRequired[int]
    train_fvu: NotRequired[float]
    validation_fvu: NotRequired[float | None]
    l0: NotRequired[float]
    dead: NotRequired[int]
    encode_mode: NotRequired[str]
    chunk_bytes: NotRequired[int]
    seconds: float | None
    """Of the whole bank."""
    bank_coders: NotRequired[int]
    """Coders of the bank."""


class MetricsLine(TypedDict):
    """A line of metrics.jsonl: means since the last line. The loss's other terms are keys, too."""

    step: int
    tokens: int
    fvu: float
    """FVU of the batches, against the variance of the training units. Of a crosscoder the mean over its sides, each of
    which has a key `fvu_side_0`, ... of its own, and likewise `validation_fvu_side_0`."""
    l0: float
    grad_norm: float
    dead: int
    density: dict[str, float]
    encode_mode: str
    recall: float
    lr: float
    ms: dict[str, float]
    seconds: float
    validation_fvu: NotRequired[float]


class RunDirectory:
    """Reads and writes the files of a run, except its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse_other(self, cfg: Any) -> None:
        """Raise UserError, naming the keys that differ, if a run of another configuration is here."""
        if not (self.path / CONFIG).exists():
            return
        then, now = (OmegaConf.to_container(c, enum_to_str=True) for c in (self.config(), OmegaConf.structured(cfg)))
        facts = differences(then, now, ignore=_FREE_KEYS)
        if facts:
            raise UserError(f"{self.path} holds another run ({facts}); choose another directory, or delete it")

    def config(self) -> Any:
        """Return config.yaml as OmegaConf reads it, without keys that no longer exist. UserError where a value refers
        to others, which may be secrets of the environment: what we write never does."""
        file = self.path / CONFIG
        try:
            found = OmegaConf.load(file)
        except YAMLError as error:
            raise UserError(f"{file} is damaged ({error}); delete the run to train it again") from None
        if "${" in file.read_text():
            raise UserError(f"{file} refers to other values by ${{...}}; a run's never does: write them out")
        for key, default in _RETIRED.items():
            section, _, name = key.rpartition(".")
            if OmegaConf.select(found, key) == default:
                del OmegaConf.select(found, section)[name]
        return found

    def write_config(self, cfg: Any) -> None:
        """Write config.yaml."""
        write_atomically(self.path / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(cfg)).encode())

    @property
    def summary(self) -> Summary | None:
        """The summary of a finished run, None for another; raises UserError if it is damaged or its coder is gone."""
        file = self.path / SUMMARY
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); delete it and run the same command again") from None
        files = find_tensors(self.path / FOLDER)
        if not files or not all(file.is_file() for file in files):
            raise UserError(
                f"{self.path} is finished, but its coder is gone ({FOLDER}/{TENSORS}); delete {self.path}, train again"
            )
        return checked(Summary, found, str(file), "delete it and run the same command again")

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json, which says that the run is finished."""
        write_atomically(self.path / SUMMARY, json.dumps(summary, indent=2).encode())

    @property
    def metrics(self) -> list[MetricsLine]:
        """The lines of metrics.jsonl, up to one cut off by a kill."""
        lines: list[MetricsLine] = []
        file = self.path / METRICS
        if not file.exists():
            return lines
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError:
                break
            lines.append(checked(MetricsLine, line, f"{file}, line {number}", "delete the run to train it again"))
        return lines

    def write_metrics(self, lines: list[MetricsLine]) -> None:
        """Replace metrics.jsonl; remove it if there are no lines."""
        if not lines:
            (self.path / METRICS).unlink(missing_ok=True)
            return
        write_atomically(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def append_metrics(self, line: MetricsLine) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    path: Path
    summary: Summary
    coder: SparseCoder
    store_path: str
    other_path: str | None = None
    """The second store, of a coder between two models."""
    is_control: bool = False
    """Whether this is no trained coder, but something that acts as one (controls.py)."""

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Read a run directory; raise UserError saying what is missing."""
        if not path.is_dir():
            raise UserError(f"run={path}: no such directory")
        directory = RunDirectory(path)
        summary = directory.summary
        if summary is None or not (path / CONFIG).exists():
            missing = CONFIG if summary else SUMMARY
            raise UserError(f"{path} is no finished run ({missing} is missing); train it to its end")
        store = directory.config().store
        return cls(path, summary, SparseCoder.load(path), str(store.path), store.get("other"))

    @property
    def stores(self) -> tuple[str, str | None]:
        """What `open_stores` takes."""
        return self.store_path, self.other_path

    @cached_property
    def configuration(self) -> str:
        """A fingerprint of the run's configuration, except its seeds and what does not change what is learned."""
        if self.is_control:
            return str(self.path)
        asked: Any = OmegaConf.to_container(RunDirectory(self.path).config())
        ignored = (*_FREE_KEYS, *_SEEDS)
        kept = {key: value for key, value in flat(asked).items() if value is not None and not key.startswith(ignored)}
        text = json.dumps(kept, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def seeds(self) -> tuple[int, int] | None:
        """Those of the coder and of the order; None of a control or an imported coder."""
        if self.is_control or self.summary["seed"] is None:
            return None
        return self.summary["seed"], int(OmegaConf.select(RunDirectory(self.path).config(), "stream.seed", default=0))

    def check(self, store: ActivationStore) -> None:
        """Raise UserError if the run is of another capture than the store holds."""
        for column in self.reads:
            if column.hookpoint not in store.hookpoints:
                raise UserError(f"{self.path} was trained on {column.hookpoint}, which {store.place} lacks")
        if self.summary["hookpoint"] != self.coder.meta["hookpoint"]:
            raise UserError(
                f"{self.path / SUMMARY} names the hookpoint {self.summary['hookpoint']!r}, but its coder "
                f"{self.coder.meta['hookpoint']!r}; train or import it again"
            )
        if self.coder.meta["data"]["store_identity"] != store.attrs["identity_hash"]:
            raise UserError(f"{self.path} was trained on another capture than {store.place} now holds")

    @cached_property
    def weights(self) -> str:
        """A fingerprint of the coder's files."""
        found = hashlib.sha256()
        for path in find_tensors(self.path / FOLDER):
            with path.open("rb") as file:
                while some := file.read(2**24):
                    found.update(some)
        return found.hexdigest()[:16]

    @property
    def filter(self) -> TokenFilter:
        """The positions this coder was trained on."""
        return TokenFilter.of(dict(self.coder.meta["data"]["filter"]))

    def keeps(self, store: ActivationStore, position_N: np.ndarray, token_N: np.ndarray) -> np.ndarray:
        """Return bool [N]: whether training would have kept these tokens of a store."""
        kept = in_store(self.filter, store, self.hookpoints)
        roles = None
        if kept.roles is not None:
            unit_N = position_N // (store.unit_rows * store.context)
            roles = np.empty(len(unit_N), np.uint8)
            for unit in np.unique(unit_N).tolist():
                mine = unit_N == unit
                roles[mine] = roles_of(store, unit)[position_N[mine] - store.unit_range(unit)[0]]
        return kept.keep(position_N, token_N, store.context, store.attrs["special_tokens"], roles)

    @property
    def read_site(self) -> Site:
        """Where the coder reads. UserError for one that reads several sides."""
        self.refuse_several()
        return Site(**self.coder.meta["read"])

    @property
    def write_site(self) -> Site:
        """Where the coder writes. UserError for one that writes several sides."""
        self.refuse_several()
        return Site(**self.coder.meta["write"])

    @property
    def several(self) -> bool:
        """Whether the coder is one of several sides at once."""
        return "sides" in self.coder.meta

    @property
    def read_sites(self) -> list[Site]:
        """Where the coder reads, layer by layer."""
        return self._sites("read")

    @property
    def write_sites(self) -> list[Site]:
        """Where the coder writes, layer by layer."""
        return self._sites("write")

    def _sites(self, which: Literal["read", "write"]) -> list[Site]:
        return [Site(facts["module"], facts["side"]) for facts in self._side_facts(which)]

    @property
    def stands_in(self) -> bool:
        """Whether the coder can stand in for MLPs."""
        return not self.several or isinstance(self.coder, CrossLayerTranscoder)

    @property
    def latents(self) -> int:
        """How many latents the coder has, of all layers."""
        layers = len(self.coder.layers) if isinstance(self.coder, CrossLayerTranscoder) else 1
        return layers * self.coder.cfg.width

    def refuse_several(self, what: str = "this") -> None:
        """Raise UserError for a coder of several sides at once."""
        if self.several:
            raise UserError(f"{self.path}: {what} is for coders of one MLP, not for a {self.summary['kind']}")

    @property
    def reads(self) -> tuple[Column, ...]:
        """The sides that the coder reads, in the order of its rows."""
        return self._columns("read")

    @property
    def writes(self) -> tuple[Column, ...]:
        """The sides that the coder writes, in the order of its rows."""
        return self._columns("write")

    def _columns(self, which: Literal["read", "write"]) -> tuple[Column, ...]:
        hookpoint = self.coder.meta["hookpoint"]
        return tuple(Column(facts.get("hookpoint", hookpoint), facts["side"]) for facts in self._side_facts(which))

    def _side_facts(self, which: Literal["read", "write"]) -> list[Any]:
        meta = self.coder.meta
        if self.several:
            return list(meta.get("read_sides", meta["sides"]) if which == "read" else meta["sides"])
        return [meta[which]]

    @property
    def hookpoints(self) -> list[str]:
        """The hookpoints of what it reads and writes."""
        return list(dict.fromkeys(column.hookpoint for column in (*self.reads, *self.writes)))

    def rows(self, store: ActivationStore, start: int, stop: int) -> Tensor:
        """Return what the coder reads of stored tokens, bfloat16 [stop - start, D]."""
        first, *others = (store.activations(*column, start, stop) for column in self.reads)
        return torch.cat([first, *others], 1) if others else first


def find_runs(pattern: str) -> list[Path]:
    """Return the run directories that match the glob, in natural order; raise UserError if none do."""
    found = [Path(p) for p in natsorted(glob.glob(pattern)) if (Path(p) / CONFIG).is_file()]
    if not found:
        raise UserError(f"runs={pattern!r} matches no run directory (one that holds {CONFIG})")
    return found
