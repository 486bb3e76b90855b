"""What every entry point shares: Hydra, exit codes, errors without tracebacks, plain progress."""

import dataclasses
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from skipcoder.pipeline.errors import UserError

# Hydra looks a relative config path up beside the caller, which fails for console scripts.
CONF = str(Path(__file__).resolve().parent.parent / "conf")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 3


def run(main: Callable[[], object]) -> int:
    """Run a Hydra main; print foreseeable mistakes as one message; return the exit code."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its own traceback and exits 1
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bar stands alone; libraries draw theirs unasked
    try:
        main()
    except UserError as error:
        return _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(explain(error))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        return _fail(no_space(error))
    return DONE


def no_space(error: OSError) -> str:
    """What to say of a full disk."""
    return f"no space left on the disk ({error.filename or 'unknown file'}); free some and run again"


def refuse_full(path: Path, key: str) -> None:
    """UserError where a folder that is to be made is there already, with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{key}={path} is not empty; choose another folder, or delete it")


def differences(old: Any, new: Any, ignore: tuple[str, ...] = ()) -> str:
    """The keys in which two nested configurations differ, with both values; "" if none does.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    'a.b: 1 there, 3 asked'
    """
    flat_old, flat_new = _flat(old), _flat(new)
    return "; ".join(
        f"{key}: {flat_old.get(key)} there, {flat_new.get(key)} asked"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key) and not key.startswith(ignore)
    )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


T = TypeVar("T")


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
    return config


def task(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a Hydra task so that a UserError ends the program before Hydra adds words of its own. In a sweep the
    error goes to the launcher instead: the other jobs go on."""

    @functools.wraps(function)
    def guarded(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            function(cfg)
        except UserError as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise
            sys.exit(_fail(str(error)))

    return guarded


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's message, with the valid keys of the node that was asked.

    >>> from omegaconf import OmegaConf
    >>> from skipcoder.pipeline.config import DataConfig
    >>> try: OmegaConf.structured(DataConfig).tokenz
    ... except Exception as e: print(explain(e).splitlines()[-1][:31])
    valid keys: context, field, kin
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
        cause = cause.__cause__
    if "mismatched input" in message or "token recognition" in message or "no viable alternative" in message:
        message += "\nhint: put values that hold = ( [ ~ or spaces in two sets of quotes, 'key=\"value\"'"
    return message


@contextmanager
def progress(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[..., None]]:
    """A live bar on a terminal; else a plain line for every tenth. Yields `advance(n, **facts)`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, facts="")
        done = printed = 0

        def advance(n: int, **facts: object) -> None:
            nonlocal done, printed
            done += n
            text = "  ".join(f"{key} {value}" for key, value in facts.items())
            bar.update(task, completed=done, facts=text)
            if not console.is_terminal and done * 10 // total > printed:
                printed = done * 10 // total
                print(f"{label}: {done:,}/{total:,} {unit}  {text}".rstrip(), file=sys.stderr, flush=True)

        yield advance
