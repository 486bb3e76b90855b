"""How a store describes itself: the attributes of its Zarr group, their types, how they are read and hashed."""

import hashlib
import json
from typing import Any, NotRequired

from omegaconf import OmegaConf
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model.load import ModelIdentity
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.text.sources import DataIdentity
from skipcoder.records import checked
from skipcoder.settings import differences, typed

FORMAT = "skipcoder.activations"
VERSION, READ = 3, (2, 3)
"""The version of new stores, and those that can be read and extended."""
FILE = "zarr.json"


class Identity(TypedDict):
    """Everything that decides the store's bytes, except how many tokens it holds."""

    model: ModelIdentity
    data: DataIdentity
    context: int
    repeat: bool
    hookpoints: list[str]
    """Patterns, as requested."""
    write_modules: dict[str, str]
    found_writing: NotRequired[dict[str, str]]
    """Hookpoint -> the module that writes, where it is neither the hooked one nor named in write_modules."""
    codec: str
    codec_revision: int
    compression: NotRequired[str]
    """In stores that began in format 2. It says nothing of a store recoded since."""
    unit_rows: int
    split_scheme: NotRequired[str]
    """How documents and splits go together (text/splits.py). Stores of before have none: their documents cross."""
    held_out_rows: NotRequired[int | None]
    """With `split_scheme`: rows that a document gives to validation and to test at most."""
    micro_batch_tokens: int
    seed: int


class HookpointFacts(TypedDict):
    """A hookpoint: the modules that are read and written, and the widths of the sides that are stored."""

    read: str
    write: str
    d_in: NotRequired[int]
    d_out: NotRequired[int]
    gained: NotRequired[str | None]
    """The module whose output the residual stream gains, None if it could not be shown; mostly `write`."""


def widths_of(facts: HookpointFacts) -> dict[str, int]:
    """{side: its width} of the sides that a store has of a hookpoint: `input`, `output` or both."""
    widths = {"input": facts.get("d_in"), "output": facts.get("d_out")}
    return {side: d for side, d in widths.items() if d is not None}


def extent(facts: HookpointFacts) -> str:
    """Say how wide a hookpoint is: "576 to 576" or, of one side, "576, output alone"."""
    widths = widths_of(facts)
    return " to ".join(map(str, widths.values())) + ("" if len(widths) > 1 else f", {min(widths)} alone")


class Described(TypedDict):
    """How a capture describes a store that it is about to lay out."""

    identity: Identity
    hookpoints: dict[str, HookpointFacts]
    model: dict[str, Any]
    """The model's configuration, from which it can be loaded again."""
    data: dict[str, Any]
    """The configuration of the text, without the number of tokens, which may grow."""
    special_tokens: list[int]
    bos: int | None
    """The token that begins every row, where the tokenizer adds one."""
    software: dict[str, str]


class Attributes(Described):
    """The attributes of a store."""

    format: str
    version: int
    compression: NotRequired[str]
    """From format 3 on."""
    identity_hash: str
    rows: int
    """Token rows that the store has or, while it is captured, will have; 0 until the tokens are written."""


def read_attrs(place: Place) -> Attributes | None:
    """Attributes of the store at `place`; None if nothing is there; UserError if something else is."""
    try:
        content = place.read(FILE)
    except (FileNotFoundError, NotADirectoryError):
        if not place.is_empty():
            raise UserError(f"{place} exists and is not an activation store; choose another store.path") from None
        return None
    try:
        attrs = json.loads(content).get("attributes", {})
    except (ValueError, AttributeError) as error:
        raise UserError(f"{place}/{FILE} is damaged ({error}); restore it or delete the store") from None
    if not isinstance(attrs, dict) or attrs.get("format") != FORMAT:
        raise UserError(f"{place} is a Zarr group, but not an activation store; choose another store.path")
    if attrs.get("version") not in READ:
        raise UserError(
            f"{place} has format version {attrs.get('version')}, this skipcoder reads {' and '.join(map(str, READ))}; "
            f"use the version of skipcoder that wrote it"
        )
    return checked(Attributes, attrs, f"{place}/{FILE}: attributes", "restore it or delete the store")


def compression_of(attrs: Attributes) -> str:
    """What the activations of a store are compressed with."""
    return attrs["compression"] if "compression" in attrs else attrs["identity"]["compression"]


def new_attrs(described: Described, compression: str) -> Attributes:
    """The attributes of an empty store."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "compression": compression,
        "identity_hash": identity_hash(described["identity"]),
        **described,
        "rows": 0,
    }


def write_rows(place: Place, rows: int) -> None:
    """Record that `rows` token rows of the store are written."""
    metadata = json.loads(place.read(FILE))
    metadata["attributes"]["rows"] = rows
    place.write(FILE, json.dumps(metadata, indent=2).encode())


def identity_hash(identity: Identity) -> str:
    """Short hash of everything that decides the store's bytes, except its length."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def refuse_other_identity(place: Place, attrs: Attributes, identity: Identity) -> None:
    """Raise UserError naming the keys in which the store at `place` differs from `identity`, if any."""
    facts = differences(attrs["identity"], identity)
    if facts:
        raise UserError(f"{place} holds another capture ({facts}); choose another store.path, or delete it")


def model_config(attrs: Attributes) -> ModelConfig:
    """The configuration of the model that a store was captured from."""
    return typed(OmegaConf.create(attrs["model"]), ModelConfig)
