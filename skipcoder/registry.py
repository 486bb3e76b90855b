"""Tables of names that can be extended: codecs, data sources, activations, kinds of coders, formats, evaluations.

A module of your own adds to them when it is imported, by `CODECS["mine"] = Mine`. As soon as a name is not found, each
process imports the modules named in the environment variable SKIPCODER_PLUGINS (comma-separated), and those that
installed packages name as entry points of the group "skipcoder". docs/extending.md has examples.
"""

import functools
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from skipcoder.errors import UserError

T = TypeVar("T")


class Registry(dict[str, T]):
    """A table for one key of the configuration. Looking up an unknown name raises UserError."""

    def __init__(self, key: str, entries: Mapping[str, T]) -> None:
        super().__init__(entries)
        self.key = key

    def __missing__(self, name: str) -> T:
        load_plugins()
        if name in self:
            return self[name]
        raise UserError(
            f"{self.key}={name}: choose from {', '.join(self)}; for one of your own, name the module that registers it "
            "in SKIPCODER_PLUGINS"
        )


@functools.cache
def load_plugins() -> None:
    """Import the modules that register extensions, once."""
    for name in filter(None, os.environ.get("SKIPCODER_PLUGINS", "").split(",")):
        try:
            import_module(name.strip())
        except ImportError as error:
            raise UserError(f"SKIPCODER_PLUGINS: module {name} cannot be imported: {error}") from None
    for entry in entry_points(group="skipcoder"):
        entry.load()
