"""Documents, texts or conversations, in a fixed order, from every source that `data/` presets name."""

import glob
import hashlib
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NotRequired, Protocol

from natsort import natsorted
from typing_extensions import TypedDict

from skipcoder import fingerprint, hub
from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig, SourceConfig, SourceKind
from skipcoder.pipeline.text.chat import Messages, messages_of
from skipcoder.registry import Registry

Document = str | Messages

PAUSES = (1, 2, 4, 8, 16, 32, 64)
"""Seconds to wait each time a stream from the hub breaks, after datasets' own retries."""


class DataIdentity(TypedDict):
    """What identifies a source, as recorded in a store."""

    kind: str
    place: str | None
    field: str
    fingerprint: str
    chat: NotRequired[str]
    """Of conversations: a hash of the chat template."""
    separate: NotRequired[bool]
    """Whether documents attend only to themselves."""


class Source(Protocol):
    """Where documents come from."""

    @property
    def path_is(self) -> str:
        """What `data.path` must be; "" if it is not needed."""

    def documents(self, cfg: DataConfig) -> Iterator[Document]:
        """Documents in a fixed order. Raises UserError naming file, line and remedy."""

    def fingerprint(self, cfg: DataConfig) -> tuple[str | None, str]:
        """The place, if it makes a difference, and a fingerprint of the content, made without reading all of it."""


def check(cfg: DataConfig) -> None:
    """Raise UserError for an unknown source and for one that lacks the path it needs."""
    if (wanted := SOURCES[cfg.kind].path_is) and not cfg.path:
        raise UserError(f"data.path is missing: data.kind={cfg.kind} needs {wanted}")
    if cfg.chat and cfg.kind in (SourceKind.stdlib, SourceKind.text):
        raise UserError(f"data.chat=true: data.kind={cfg.kind} holds no conversations; use jsonl, parquet, huggingface")
    if cfg.chat and cfg.kind == SourceKind.mix:
        raise UserError("data.chat=true: each source of data.kind=mix has a chat of its own, in data.sources")
    if cfg.sources and cfg.kind != SourceKind.mix:
        raise UserError(f"data.sources is for data.kind=mix, not {cfg.kind}")
    if cfg.kind == SourceKind.mix and not cfg.sources:
        raise UserError("data.kind=mix needs data.sources, a list of {kind, path, weight}")
    for one in cfg.sources:
        check(of_mix(cfg, one))


def of_mix(cfg: DataConfig, one: SourceConfig) -> DataConfig:
    """The configuration of one source of a mixture."""
    own = {f.name: getattr(one, f.name) for f in fields(one) if f.name != "weight"}
    return replace(cfg, sources=[], **own)


def documents(cfg: DataConfig) -> Iterator[Document]:
    """The source's documents in their fixed order."""
    yield from SOURCES[cfg.kind].documents(cfg)


def identity(cfg: DataConfig) -> DataIdentity:
    """What identifies the source: kind, place and content fingerprint, found without reading all of it."""
    place, content = SOURCES[cfg.kind].fingerprint(cfg)
    found: DataIdentity = {"kind": str(cfg.kind), "place": place, "field": cfg.column, "fingerprint": content}
    if cfg.separate:
        found["separate"] = True
    return found


@dataclass(frozen=True)
class Files:
    """Files of one format, in natural order of their paths."""

    suffixes: tuple[str, ...]
    read: Callable[[Path, DataConfig], Iterator[Document]]
    path_is: str = "a file, directory or glob"

    def documents(self, cfg: DataConfig) -> Iterator[Document]:
        """Documents of all files."""
        for path in self.files(cfg)[1]:
            yield from self.read(path, cfg)

    def fingerprint(self, cfg: DataConfig) -> tuple[None, str]:
        """Fingerprint of names and contents; the same files elsewhere are the same source."""
        root, files = self.files(cfg)
        return None, fingerprint.of_files(files, root)

    def files(self, cfg: DataConfig) -> tuple[Path, list[Path]]:
        """(common root, files in reading order)."""
        assert cfg.path is not None
        path = Path(cfg.path).expanduser()
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.suffix in self.suffixes and p.is_file()]
            wanted = f"files ending in {', '.join(self.suffixes)} in directory"
            root = path
        else:
            files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
            wanted = "file or files matching"
            root = files[0].parent if len(files) == 1 else Path(path.anchor or ".")
        if not files:
            raise UserError(f"data.path={cfg.path}: found no {wanted} {path}")
        return root, natsorted(files, key=str)


class Stdlib(Files):
    """The source files that come with Python."""

    def files(self, cfg: DataConfig) -> tuple[Path, list[Path]]:
        """Files ordered by a hash of the name, so that any prefix is a mixture of the whole library."""
        root = Path(sysconfig.get_paths()["stdlib"])
        inside = (path for path in root.rglob("*.py") if "site-packages" not in path.parts and path.is_file())
        return root, sorted(inside, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


class Hub:
    """A data set of the Hugging Face Hub, streamed."""

    path_is = "a dataset id"

    def documents(self, cfg: DataConfig) -> Iterator[Document]:
        """Documents in the data set's order."""
        return _from_hub(cfg)

    def fingerprint(self, cfg: DataConfig) -> tuple[str, str]:
        """The data set's name, subset and split; its commit."""
        assert cfg.path is not None
        commit = hub.commit_of(cfg.path, cfg.revision, "dataset")
        return "/".join(filter(None, (cfg.path, cfg.subset, cfg.split))), commit


class Mix:
    """Several sources. rows.py takes their documents in turn."""

    path_is = ""

    def documents(self, cfg: DataConfig) -> Iterator[Document]:
        """Nothing by itself: which document comes next depends on the tokens of those before."""
        raise NotImplementedError("rows.Mixture reads the sources of a mixture")

    def fingerprint(self, cfg: DataConfig) -> tuple[None, str]:
        """Of all sources and their weights."""
        facts = [{"weight": one.weight, "chat": one.chat, **identity(of_mix(cfg, one))} for one in cfg.sources]
        return None, hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _read_text(path: Path, _: DataConfig) -> Iterator[str]:
    raw = path.read_bytes()
    try:
        yield raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if path.is_relative_to(sysconfig.get_paths()["stdlib"]):
            yield raw.decode("latin-1")  # Python's own sources may declare another encoding
            return
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}); "
            f"convert it, for example: iconv -f LATIN1 -t UTF-8 {path.name} > {path.stem}.utf8{path.suffix}"
        ) from None


def _read_jsonl(path: Path, cfg: DataConfig) -> Iterator[Document]:
    field = cfg.column
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # bad JSON and bad UTF-8 alike
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if cfg.chat and isinstance(record, dict) and field in record:
                if record[field] in ([], None):
                    continue
                yield messages_of(record[field], f"{path}, line {number}")
                continue
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                what = "conversation" if cfg.chat else "text"
                raise UserError(f"{path}, line {number}: no {what} under {field!r} (it has: {has}); set data.field")
            yield record[field]


def _read_parquet(path: Path, cfg: DataConfig) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    field, number = cfg.column, 0
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from None
    if field not in file.schema_arrow.names:
        raise UserError(
            f"{path} has no column {field!r} (it has: {', '.join(file.schema_arrow.names)}); set data.field"
        )
    for batch in file.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            number += 1
            if value:
                yield messages_of(value, f"{path}, row {number}") if cfg.chat else value


def _from_hub(cfg: DataConfig) -> Iterator[Document]:
    from datasets import load_dataset

    assert cfg.path is not None
    try:
        rows = load_dataset(cfg.path, cfg.subset, split=cfg.split, revision=cfg.revision, streaming=True)
        for number, row in enumerate(_patiently(rows), 1):
            if cfg.column not in row:
                raise UserError(
                    f"dataset {cfg.path} has no column {cfg.column!r} (it has: {', '.join(row)}); set data.field"
                )
            value = row[cfg.column]
            if cfg.chat and not value:
                continue
            yield messages_of(value, f"dataset {cfg.path}, row {number}") if cfg.chat else value
    except UserError:
        raise
    except Exception as error:  # the clients' errors (httpx, aiohttp, requests) share no base class
        raise UserError(f"data.path={cfg.path}: cannot read this dataset from the hub ({error})") from error


def _patiently(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a streamed data set in order; if the stream breaks, resume it after a pause. A stream that
    never began is not tried again: its name is wrong, or the hub out of reach."""
    failures, begun = 0, False
    while True:
        try:
            for row in rows:
                failures, begun = 0, True
                yield row
            return
        except Exception as error:
            if not begun or failures == len(PAUSES):
                raise
            print(f"the data set's stream broke off ({error}); going on in {PAUSES[failures]} s", flush=True)
            time.sleep(PAUSES[failures])
            failures += 1
            rows.load_state_dict(rows.state_dict())


_TEXT = (".txt", ".md", ".rst", ".py")
SOURCES: Registry[Source] = Registry(
    "data.kind",
    {
        SourceKind.stdlib: Stdlib(_TEXT, _read_text, path_is=""),
        SourceKind.text: Files(_TEXT, _read_text),
        SourceKind.jsonl: Files((".jsonl", ".ndjson"), _read_jsonl),
        SourceKind.parquet: Files((".parquet",), _read_parquet),
        SourceKind.huggingface: Hub(),
        SourceKind.mix: Mix(),
    },
)
