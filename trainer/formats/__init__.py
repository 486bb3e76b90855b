"""The files other tools keep coders in: one module a format, each with what it can hold and what it cannot.

A module has `MARK`, the file by which its folders are known, and `read(folder, ...)`; those of formats we also write
have `write(coder, folder, ...)`, which refuses (UserError) a coder that the format cannot hold as it is.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from skipcoder.pipeline.errors import UserError
from skipcoder.trainer.formats.config import Source

if TYPE_CHECKING:
    from skipcoder.trainer.coder import SparseCoder


def module(name: str) -> ModuleType:
    """The module of a format."""
    return import_module(f"skipcoder.trainer.formats.{name}")


def detect(folder: Path) -> str:
    """The format of a folder's files; UserError where it is none that is known."""
    for name in Source:
        if any(folder.glob(module(name).MARK)):
            return name
    marks = ", ".join(f"{module(name).MARK} ({name})" for name in Source)
    raise UserError(f"{folder} holds no coder; looked for {marks}")


def read(folder: Path, format: str | None = None, **options: Any) -> "SparseCoder":
    """The coder in a folder; `options` are those of the format's own `read`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    name = format or detect(folder)
    if name not in list(Source):
        raise UserError(f"format={name}: can read {', '.join(Source)}")
    try:
        return module(name).read(folder, **options).requires_grad_(False).eval()
    except TypeError as error:
        if "unexpected keyword" in str(error) or "required keyword" in str(error):
            raise UserError(f"format={name}: {error}") from None
        raise
