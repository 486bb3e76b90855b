"""Hookpoints: the modules that are read and written, found by globs over module names."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from natsort import natsorted
from wcmatch.fnmatch import BRACE, CASE, fnmatch

from skipcoder.errors import UserError


@dataclass(frozen=True)
class Hookpoint:
    """A pair of places in a model: the input of module `read` and the output of module `write`, or one of them."""

    name: str
    read: str
    write: str
    sides: tuple[str, ...] = ("input", "output")
    """Those that are captured."""
    is_named: bool = field(default=False, compare=False)
    """Whether the user named the module that is written."""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a glob matches, in their own order: those with as many parts as it has or, if there are none, all.

    >>> matching("layers.{4,8}.mlp", ["layers.4.mlp", "layers.5.mlp", "layers.8.mlp"])
    ['layers.4.mlp', 'layers.8.mlp']
    >>> matching("layers.*", ["layers.0", "layers.0.mlp"]), matching("*.mlp", ["layers.0", "layers.0.mlp"])
    (['layers.0'], ['layers.0.mlp'])
    """
    found = [name for name in names if fnmatch(name, pattern, flags=BRACE | CASE)]
    alike = [name for name in found if name.count(".") == pattern.count(".")]
    return alike if alike and pattern != "*" else found


def resolve(patterns: Iterable[str], write_modules: Mapping[str, str], modules: Iterable[str]) -> list[Hookpoint]:
    """Hookpoints that match `patterns` (globs over module names), in natural order, without repeats. A pattern that
    ends in `:input` or `:output` stands for that side alone.

    Raises UserError for a pattern that matches nothing, listing the modules.
    """
    names = [name for name in modules if name]
    found: dict[str, set[str]] = {}
    for asked in patterns:
        pattern, colon, side = asked.partition(":")
        if colon and side not in ("input", "output"):
            raise UserError(f"hookpoint {asked!r}: what follows the colon must be input or output")
        matches = matching(pattern, names)
        if not matches:
            raise UserError(f"hookpoint {asked!r} matches no module of this model; {_hint(pattern, names)}")
        for name in matches:
            found.setdefault(name, set()).update([side] if colon else ["input", "output"])
    written = {name: _write_module(name, write_modules, names) for name in natsorted(found)}
    return [
        Hookpoint(name, name, write or name, tuple(sorted(found[name])), write is not None)
        for name, write in written.items()
    ]


def _write_module(name: str, write_modules: Mapping[str, str], names: list[str]) -> str | None:
    for pattern, target in write_modules.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.*)"), name)
        if match:
            for group in match.groups():
                target = target.replace("*", group, 1)
            if target not in names:
                raise UserError(
                    f"model.write_modules: {pattern!r} leads from {name!r} to {target!r}, which does not exist"
                )
            return target
    return None


def _hint(pattern: str, names: list[str]) -> str:
    """What the user may have meant: similar names, and the distinct shapes of names (`layers.*.mlp`)."""
    near = difflib.get_close_matches(pattern, names, n=5)
    shapes = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    shown = ", ".join(shapes[:25]) + (", ..." if len(shapes) > 25 else "")
    return (f"did you mean {', '.join(near)}? " if near else "") + f"modules: {shown}"


def layers_needed(hookpoints: Iterable[Hookpoint]) -> int | None:
    """Number of layers that must run to reach every hookpoint, or None if a name has no layer number.

    >>> layers_needed([Hookpoint("layers.3.mlp", "layers.3.mlp", "layers.3.norm")])
    4
    """
    numbers = [re.search(r"\.(\d+)(\.|$)", module) for h in hookpoints for module in (h.read, h.write)]
    if not all(numbers):
        return None
    return 1 + max(int(match.group(1)) for match in numbers if match)
