"""A helper that the tests start."""

import errno
import signal
from collections.abc import Callable
from typing import Any

from skipcoder.errors import UserError
from skipcoder.helpers import SharedArrays


def start(setup: dict[str, Any]) -> Callable[[Any], Any]:
    if "fail" in setup:
        raise UserError(setup["fail"])
    shared = SharedArrays(setup["specs"], setup["descriptor"]) if "specs" in setup else None

    def answer(request: Any) -> Any:
        if request == "refuse":
            raise UserError("refused; do otherwise")
        if request == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "some file")
        if request == "interrupt":
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(signum)
        if shared is not None:
            shared.arrays["b"][request] += 1
        return request

    return answer
