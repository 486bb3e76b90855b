"""A step as one CUDA graph: hundreds of small launches become one.

A graph repeats the same work on the same memory, so it stands for one shape of batch and one set of decisions, its
`key`. The first step of a key runs eagerly (kernels are compiled, optimisers make their state), the second is captured
and from then on replayed; all give the same bits. What changes from step to step must be in tensors on the device.

All graphs of a device take their passing memory from one pool, which the graphs of a bank's members can share because
they run one after another and nothing that one leaves in the pool is read after it: results are copied out.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]

_pools: dict[torch.device, tuple[Any, torch.cuda.CUDAGraph]] = {}
_inputs: dict[Hashable, Tensor] = {}


def fixed(role: str, n: int, d: int, device: torch.device) -> Tensor:
    """Return the memory from which all graphs read a float32 input [n, d] of this role."""
    key = role, n, d, device
    if key not in _inputs:
        _inputs[key] = torch.empty(n, d, device=device)
    return _inputs[key]


def _pool(device: torch.device) -> Any:
    """Return the device's pool. One graph is kept for ever: torch refuses a pool whose graphs are all gone."""
    if device not in _pools:
        keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(keeper, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)
        _pools[device] = keeper.pool(), keeper
    return _pools[device][0]


class Graphs:
    """The graphs of one coder's steps."""

    def __init__(self) -> None:
        self.usable = True
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[str], Tensor] | None] = {}

    def run(self, key: Hashable, step: Callable[[], Results]) -> Results:
        """Make a step, which reads fixed memory and returns 0-d tensors."""
        if key not in self._graphs:
            self._graphs[key] = None
            return step()
        found = self._graphs[key]
        if found is None and self.usable:
            found = self._graphs[key] = self._capture(step)
        if found is None:
            return step()
        graph, names, results = found
        graph.replay()
        return dict(zip(names, results.clone().unbind(), strict=True))

    def _capture(self, step: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, list[str], Tensor] | None:
        device = torch.device("cuda", torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        try:
            pool = _pool(device)
            # Other threads may allocate meanwhile: the stream reads ahead.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                results = step()
                stacked = torch.stack([value.float() for value in results.values()])
        except RuntimeError as error:  # an activation or kind of the user's own may do what cannot be captured
            self.usable = False
            print(f"steps run eagerly, as one cannot be captured: {str(error).splitlines()[0]}")
            return None
        return graph, list(results), stacked
