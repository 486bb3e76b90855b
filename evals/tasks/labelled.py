"""Labelled texts: real ones from the package sae-probes (arXiv 2502.16681; only its data is read, so its requirements
need not be installed), or the user's own CSV files."""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from skipcoder.errors import UserError

_PACKAGE = "sae_probes"
_SUFFIX = ".csv.zst"


class Labelled(NamedTuple):
    """Texts and one label each."""

    name: str
    texts: list[str]
    labels: np.ndarray
    """int64: index of each text's label in the sorted `classes`."""
    classes: list[str]


@cache
def bundled() -> dict[str, Path]:
    """{name: file} of the data sets in sae-probes, ordered by their numbers."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the labelled texts of sae-probes are not installed; pip install --no-deps sae-probes")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "cleaned_data"
    files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: int(file.name.split("_")[0]))
    return {file.name.removesuffix(_SUFFIX): file for file in files}


@cache
def binary_names() -> list[str]:
    """Names of the data sets with two classes."""
    return [name for name in bundled() if len(set(_column(bundled()[name], "target"))) == 2]


def find(name: str) -> Labelled:
    """A bundled data set by its name, or a CSV file (columns `prompt` and `target`) by its path."""
    if name.endswith(".csv"):
        return load(Path(name))
    if name not in bundled():
        raise UserError(f"no data set {name!r} in sae-probes; a CSV's path ends in .csv; there are: {_some(bundled())}")
    return load(bundled()[name], name)


def distinct(data: Labelled, rows: Sequence[list[int]]) -> tuple[Labelled, list[list[int]]]:
    """Keep only the first of the texts whose tokens (as cut) are the same, and none if their labels contradict: no text
    may be in both training and test."""
    first: dict[tuple[int, ...], int] = {}
    contradictory: set[int] = set()
    for place, row in enumerate(rows):
        before = first.setdefault(tuple(row), place)
        if data.labels[before] != data.labels[place]:
            contradictory.add(before)
    kept = [place for place in first.values() if place not in contradictory and len(rows[place]) > 1]
    texts = [data.texts[place] for place in kept]
    return data._replace(texts=texts, labels=data.labels[kept]), [rows[place] for place in kept]


def load(path: Path, name: str | None = None, target: str = "target") -> Labelled:
    """Texts in column `prompt`, labels in column `target`."""
    texts = [str(text) for text in _column(path, "prompt")]
    values = [str(value) for value in _column(path, target)]
    if len(texts) != len(values) or "None" in values:
        raise UserError(f"{path}: column {target!r} has empty cells")
    classes = sorted(set(values))
    if len(classes) < 2:
        raise UserError(f"{path}: column {target!r} holds only {classes}; two classes are needed")
    place = {value: i for i, value in enumerate(classes)}
    return Labelled(name or path.stem, texts, np.array([place[value] for value in values]), classes)


def balanced(labels: np.ndarray, count: int, seed: str) -> np.ndarray:
    """Indices of about `count` texts, equally many of each label, in an order that depends only on `seed`."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))
    groups = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    each = min(count // len(groups), *map(len, groups))
    return rng.permutation(np.concatenate([group[:each] for group in groups]))


def _column(path: Path, name: str) -> list[Any]:
    try:
        with pa.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as stream:
            table = pyarrow.csv.read_csv(stream, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    if name not in table.column_names:
        raise UserError(f"{path} has no column {name!r}; it has {', '.join(table.column_names)}")
    result: list[Any] = table[name].to_pylist()
    return result


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:8]) + ", ..."
