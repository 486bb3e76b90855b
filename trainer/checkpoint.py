"""Files of a run: the coder for users, the state for resuming. Every file appears whole or not at all."""

import glob
import json
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from skipcoder.pipeline import cli
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.place import write_atomically
from skipcoder.trainer.coder import SparseCoder, make_coder
from skipcoder.trainer.config import CoderConfig, Kind

FORMAT_VERSION = 1
TENSORS = "coder.safetensors"
DESCRIPTION = "coder.json"


def save_coder(coder: SparseCoder, folder: Path) -> None:
    """Write coder.safetensors and coder.json. The tensors carry the description too, so that the pair can
    never be read half old, half new."""
    tensors = {name: value.detach().contiguous() for name, value in coder.state_dict().items()}
    description = {
        "format_version": FORMAT_VERSION,
        **{key: _plain(value) for key, value in vars(coder.cfg).items()},
        "d_in": coder.d_in,
        "d_out": coder.d_out,
        "dtype": "float32",
        "subtract_decoder_bias": coder.cfg.kind == Kind.sae,
        **coder.meta,
    }
    text = json.dumps(description, indent=2)
    write_atomically(folder / TENSORS, safetensors_save(tensors, {"coder.json": text}))
    write_atomically(folder / DESCRIPTION, text.encode())


def load_coder(path: Path) -> SparseCoder:
    """Load what `save_coder` wrote; `path` may be the run, its checkpoint folder or the folder itself."""
    for folder in (path / "checkpoint", path):
        file = folder / TENSORS
        if file.is_file():
            break
    else:
        raise UserError(f"no {TENSORS} in {path} or {path / 'checkpoint'}; has this run been trained to its end?")
    try:
        content = file.read_bytes()
        tensors = safetensors_load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        description = json.loads(header["__metadata__"]["coder.json"])
    except Exception as error:  # safetensors raises its own type, json and KeyError others
        raise UserError(f"{file} is damaged or not a skipcoder checkpoint ({error})") from None
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {description.get('format_version')}, this skipcoder reads {FORMAT_VERSION}"
        )
    fields = {field: description.pop(field) for field in CoderConfig.__dataclass_fields__}
    cfg = cli.typed(OmegaConf.create(fields), CoderConfig)
    coder = make_coder(cfg, description.pop("d_in"), description.pop("d_out"))
    coder.load_state_dict(tensors)
    own = ("format_version", "dtype", "subtract_decoder_bias")
    coder.meta = {key: value for key, value in description.items() if key not in own}
    return coder.requires_grad_(False).eval()


def find_runs(pattern: str) -> list[Path]:
    """Run directories that the glob matches, in natural order; UserError where there is none."""
    from natsort import natsorted

    found = [Path(p) for p in natsorted(glob.glob(pattern)) if (Path(p) / "config.yaml").is_file()]
    if not found:
        raise UserError(f"runs={pattern!r} matches no run directory (one that holds config.yaml)")
    return found


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write the resume point, replacing the last one in one step."""
    write_atomically(folder / "state" / "state.pt", lambda file: torch.save(state, file))


def load_state(folder: Path) -> dict[str, Any] | None:
    """The resume point, or None where there is none."""
    file = folder / "state" / "state.pt"
    if not file.is_file():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} is damaged ({error}); delete it to start this run over") from None


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
