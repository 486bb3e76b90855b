"""What every entry point shares: Hydra, exit codes, and errors without tracebacks."""

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipcoder.errors import UserError
from skipcoder.files import explained
from skipcoder.settings import described, explain

# Absolute, since Hydra looks up a relative config path beside the caller, which fails for console scripts.
CONF = str(Path(__file__).resolve().parent / "conf")

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 3


def run(main: Callable[[], object], name: str = "") -> int:
    """Run a program; print foreseeable mistakes as one message; return the exit code. `name`: that of a Hydra main's
    configuration in conf/, for --help and for values without quotes."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its own traceback and exits 1
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries would draw bars beside our own
    asks_for_help = bool(name and {"--help", "-h"} & set(sys.argv[1:]))
    if name:
        sys.argv[1:] = map(quoted, sys.argv[1:])
    try:
        if asks_for_help:
            print(_help(name), flush=True)
        else:
            main()
    except UserError as error:
        return _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(explain(error))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE if asks_for_help else FAILED
    except OSError as error:
        if (message := explained(error)) is None:
            raise
        return _fail(message)
    return DONE


def _help(name: str) -> str:
    """What a program does, its presets, and each of its settings with default and meaning."""
    import yaml
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    conf = yaml.safe_load(Path(CONF, f"{name}.yaml").read_text())
    text: str = conf["hydra"]["help"]["template"].strip()
    keys = [
        key.removeprefix("optional ") for default in conf["defaults"] if isinstance(default, dict) for key in default
    ]
    groups = [key for key in keys if not key.startswith("override")] + (["experiment"] if name == "train" else [])
    presets = [
        f"  {'+' if group == 'experiment' else ''}{group}="
        + "|".join(sorted(p.stem for p in Path(CONF, group).glob("*.yaml")))
        for group in groups
    ]
    node = ConfigStore.instance().repo[f"{name}_schema.yaml"].node
    schema = OmegaConf.get_type(node)
    assert schema is not None
    settings = described(schema)
    return "\n".join([text, *(["", "Presets:", *presets] if presets else []), "", "Settings (key=value):", *settings])


def quoted(argument: str) -> str:
    """A setting whose value Hydra cannot read, such as a path with a bracket in it, with the quotes that it asks for;
    and a prompt, which may hold commas.

    >>> quoted("store.path=/data/my (new) store"), quoted("coder.k=32,64"), quoted("prompt=Yes, we")
    ("store.path='/data/my (new) store'", 'coder.k=32,64', "prompt='Yes, we'")
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    key, equals, value = argument.partition("=")
    in_quotes = f"{key}='" + value.replace("'", "\\'") + "'"
    is_text = bool(equals) and not argument.startswith("-") and not value.startswith(("[", "{", "'", '"'))
    forms = [argument, in_quotes]
    if key == "prompt" and not (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        forms, is_text = [in_quotes], True
    for form in forms if is_text else ():
        with suppress(HydraException):
            parser.parse_override(form)
            return form
    return argument


def task(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a Hydra task so that a UserError, or a place that cannot be written, ends the program before Hydra adds its
    own messages. In a sweep the error goes to the launcher instead, and the other jobs go on."""

    @functools.wraps(function)
    def guarded(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            function(cfg)
        except (UserError, OSError) as error:
            message = explained(error) if isinstance(error, OSError) else str(error)
            if HydraConfig.get().mode is RunMode.MULTIRUN or message is None:
                raise
            sys.exit(_fail(message))

    return guarded


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT
