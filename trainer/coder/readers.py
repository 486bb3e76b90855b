"""Read coders from folders: the formats that can be read, by name.

Each format is a module (trainer/formats/ has the built-in ones) with `MARK`, the glob that identifies its folders, and
`read(folder, ...)`. The modules import coders, and coders reach them through this table alone.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from skipcoder.errors import UserError
from skipcoder.registry import Registry, load_plugins


class Reader(Protocol):
    """A format that coders can be read from."""

    MARK: str

    def read(self, folder: Path, **options: Any) -> nn.Module:
        """Return the coder in a folder; raise UserError for one that we cannot represent."""


class _Module:
    """A format's module, imported when it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


_BUILT_IN = ("plain", "sparsify", "saelens", "circuit_tracer", "gemma_scope")
READERS: Registry[Reader] = Registry(
    "format", {name: _Module(f"skipcoder.trainer.formats.{name}") for name in _BUILT_IN}
)


def detect(folder: Path) -> str:
    """Return the format of a folder's files; raise UserError if it is unknown."""
    load_plugins()
    for name, reader in READERS.items():
        if any(folder.glob(reader.MARK)):
            return name
    marks = ", ".join(f"{reader.MARK} ({name})" for name, reader in READERS.items())
    raise UserError(f"{folder} holds no coder; looked for {marks}")


def read(folder: Path, format: str | None = None, **options: Any) -> nn.Module:
    """Return the coder in a folder, ready to use; `options` go to the format's own `read`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    name = format or detect(folder)
    reader = READERS[name]
    try:
        return reader.read(folder, **options).requires_grad_(False).eval()
    except TypeError as error:
        if "unexpected keyword" in str(error) or "required keyword" in str(error):
            raise UserError(f"format={name}: {error}") from None
        raise
