"""Choose the device to run on."""

import torch

from skipcoder.errors import UserError


def pick_device(asked: str | None, key: str = "train.device") -> str:
    """Return the device asked for, if available; if none is asked for, cuda before cpu."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{key}={asked}, but torch sees no GPU here; use cpu, or leave it null")
    try:
        return str(torch.empty(0, device=asked).device)
    except RuntimeError as error:
        raise UserError(f"{key}={asked}: {str(error).splitlines()[0]}") from None
