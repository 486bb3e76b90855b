"""Turn Hydra's configurations into typed dataclasses, compare them, and explain what is wrong with them."""

import ast
import dataclasses
import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import pairwise
from typing import Any, TypeVar

from skipcoder.errors import UserError

T = TypeVar("T")


def differences(old: Any, new: Any, ignore: tuple[str, ...] = ()) -> str:
    """The keys in which two nested configurations differ, with both values; "" if none does.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    'a.b: 1 there, 3 asked'
    """
    flat_old, flat_new = flat(old), flat(new)
    return "; ".join(
        f"{key}: {flat_old.get(key)} there, {flat_new.get(key)} asked"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key) and not key.startswith(ignore)
    )


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by dotted keys.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def described(schema: type, prefix: str = "") -> Iterator[str]:
    """A line or more for each setting of a configuration's dataclass: key, default, and what its docstring says."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(tree, ast.ClassDef)
    said = {
        node.target.id: inspect.cleandoc(text.value.value)
        for node, text in pairwise(tree.body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
    for field in dataclasses.fields(schema):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from described(type(default), f"{prefix}{field.name}.")
            continue
        head = f"  {prefix}{field.name}={_typed_as(default)}"
        meaning = textwrap.wrap(" ".join(said.get(field.name, "").split()), 84)
        if len(head) < 34 and meaning:
            yield f"{head:<34}  {meaning.pop(0)}"
        else:
            yield head
        yield from (f"{'':<34}  {line}" for line in meaning)


def _typed_as(value: Any) -> str:
    """A value as one types it.

    >>> _typed_as([1, 2]), _typed_as(None), _typed_as(True), _typed_as("???")
    ('[1,2]', 'null', 'true', '...')
    """
    if isinstance(value, list):
        return f"[{','.join(map(_typed_as, value))}]"
    names = {"None": "null", "True": "true", "False": "false", "???": "..."}
    text = str(value.value if isinstance(value, Enum) else value)
    return names.get(text, text)


def typed(cfg: Any, schema: type[T]) -> T:
    """Hydra's configuration as an instance of its dataclass. UserError for unknown keys (Hydra lets `+key=value`
    add them) and missing values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(config, schema)
    assert isinstance(plain, dict)
    keyed: dict[str, Any] = plain  # type: ignore[assignment]
    for key, value in flat(keyed).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be a number")
    return config


def as_typed(config: T) -> T:
    """A configuration made in Python, its values as the command line would have read them ("adam" is OptimName.adam).
    UserError for what its class does not take."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found = OmegaConf.to_object(OmegaConf.structured(config))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(found, type(config))
    return found


def refuse_unknown(what: str, settings: Mapping[str, Any], schema: type, *own: str) -> None:
    """UserError for keyword arguments that are no fields of the schema, or `own`, which the caller sets itself."""
    names = [field.name for field in dataclasses.fields(schema) if field.name not in own]
    if wrong := sorted(settings.keys() - set(names)):
        raise UserError(f"{', '.join(wrong)}: no setting of {what}; there are {', '.join(names)}")


def explain(error: BaseException) -> str:
    """Message of a Hydra or OmegaConf error, with the valid keys of the node at fault.

    >>> from omegaconf import OmegaConf
    >>> from skipcoder.pipeline.config import DataConfig
    >>> try: OmegaConf.structured(DataConfig).tokenz
    ... except Exception as e: print(explain(e).splitlines()[-1][:31])
    valid keys: context, field, hel
    """
    message = str(error).strip()
    cause: BaseException | None = error
    while cause is not None:
        node_type = getattr(cause, "object_type", None)
        if dataclasses.is_dataclass(node_type) and "Key" in f"{type(cause).__name__}{cause}":
            names = sorted(field.name for field in dataclasses.fields(node_type))
            return f"{str(cause).splitlines()[0]} ({message.splitlines()[0]})\nvalid keys: {', '.join(names)}"
        if type(cause).__name__ in ("ValidationError", "OverrideParseException"):
            message = str(cause)
            break  # what caused this in turn, which OmegaConf keeps under a debugger, names no key
        cause = cause.__cause__
    if "is not a ListConfig" in message and (key := re.search(r"full_key: (\S+)", message)):
        message = f"{key[1]} takes a list, {key[1]}='[A]' or '[A,B]'"
    unread = ("mismatched input", "token recognition", "no viable alternative", "NoViableAlt")
    if any(sign in message for sign in unread):
        message += "\nhint: put values that hold = ( [ ~ or spaces in two sets of quotes, 'key=\"value\"'"
    return message
