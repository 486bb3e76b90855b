"""Documents, one string each, in a fixed order, from every source that `data/` presets name."""

import glob
import hashlib
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from natsort import natsorted
from skipcoder.pipeline import fingerprint
from skipcoder.pipeline.config import DataConfig, SourceKind
from skipcoder.pipeline.errors import UserError

PAUSES = (1, 2, 4, 8, 16, 32, 64)
"""Seconds to wait when a stream from the hub has broken, after what datasets tries by itself."""

_SUFFIXES = {
    SourceKind.text: (".txt", ".md", ".rst", ".py"),
    SourceKind.jsonl: (".jsonl", ".ndjson"),
    SourceKind.parquet: (".parquet",),
}


def documents(cfg: DataConfig) -> Iterator[str]:
    """The source's documents in their fixed order. Raises UserError naming file, line and remedy."""
    if cfg.kind is SourceKind.huggingface:
        yield from _from_hub(cfg)
        return
    read: dict[SourceKind, Callable[[Path, str], Iterator[str]]] = {
        SourceKind.stdlib: _read_text,
        SourceKind.text: _read_text,
        SourceKind.jsonl: _read_jsonl,
        SourceKind.parquet: _read_parquet,
    }
    for path in _files(cfg)[1]:
        yield from read[cfg.kind](path, cfg.field)


def identity(cfg: DataConfig) -> dict[str, str | None]:
    """What makes two sources the same source: kind, place and content fingerprint, without reading it all."""
    if cfg.kind is SourceKind.huggingface:
        assert cfg.path is not None
        commit = fingerprint.hub_commit(cfg.path, cfg.revision, "dataset")
        place: str | None = "/".join(filter(None, (cfg.path, cfg.subset, cfg.split)))
    else:
        root, files = _files(cfg)
        commit = fingerprint.of_files(files, root)
        place = None  # the same files elsewhere are the same source
    return {"kind": cfg.kind.value, "place": place, "field": cfg.field, "fingerprint": commit}


def _files(cfg: DataConfig) -> tuple[Path, list[Path]]:
    """(common root, files in reading order)."""
    if cfg.kind is SourceKind.stdlib:
        root = Path(sysconfig.get_paths()["stdlib"])
        inside = (path for path in root.rglob("*.py") if "site-packages" not in path.parts and path.is_file())
        # By a hash of the name, so that any prefix is a mixture of the whole library.
        return root, sorted(inside, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
    assert cfg.path is not None
    path = Path(cfg.path).expanduser()
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix in _SUFFIXES[cfg.kind] and p.is_file()]
        wanted = f"files ending in {', '.join(_SUFFIXES[cfg.kind])} in directory"
        root = path
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        wanted = "file or files matching"
        root = files[0].parent if len(files) == 1 else Path(path.anchor or ".")
    if not files:
        raise UserError(f"data.path={cfg.path}: found no {wanted} {path}")
    return root, natsorted(files, key=str)


def _read_text(path: Path, _: str) -> Iterator[str]:
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


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # bad JSON and bad UTF-8 alike
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{path}, line {number}: no text under {field!r} (it has: {has}); set data.field")
            yield record[field]


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from None
    if field not in file.schema_arrow.names:
        raise UserError(
            f"{path} has no column {field!r} (it has: {', '.join(file.schema_arrow.names)}); set data.field"
        )
    for batch in file.iter_batches(columns=[field]):
        yield from (value for value in batch.column(0).to_pylist() if value)


def _from_hub(cfg: DataConfig) -> Iterator[str]:
    from datasets import load_dataset

    assert cfg.path is not None
    try:
        rows = load_dataset(cfg.path, cfg.subset, split=cfg.split, revision=cfg.revision, streaming=True)
        for row in _patiently(rows):
            if cfg.field not in row:
                raise UserError(
                    f"dataset {cfg.path} has no column {cfg.field!r} (it has: {', '.join(row)}); set data.field"
                )
            yield row[cfg.field]
    except UserError:
        raise
    except Exception as error:  # the clients' errors (httpx, aiohttp, requests) share no base class
        raise UserError(f"data.path={cfg.path}: cannot read this dataset from the hub ({error})") from error


def _patiently(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows of a streamed data set, in their order; when it breaks off, from there on after a pause. A stream that never
    began is not tried again: its name is wrong, or the hub out of reach."""
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
