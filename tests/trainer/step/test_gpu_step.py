"""The step as a GPU makes it, in Triton's interpreter: right, and without anything that would wait for the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from skipcoder.kernels import backend
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.config import (
    CoderConfig,
    EncodeConfig,
    EncodeMode,
    Kind,
    LoopConfig,
    LossConfig,
    OptimConfig,
    OptimName,
    TrainConfig,
)
from skipcoder.trainer.step.learner import Learner

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
N, D, M, K = 12, 16, 48, 3
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "is_nonzero"}


class NoWaits(TorchDispatchMode):
    """Raises at operations for whose result a CPU waits, also inside operations of ours."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            raise AssertionError(f"{func} would wait for the device")
        if func.namespace != "skipcoder":
            return func(*args, **(kwargs or {}))
        with self:
            return OPDEFS[f"skipcoder::{name}"]._init_fn(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "ON_CPU", True)
    yield


def learner(**options: Any) -> tuple[Learner, list[Any]]:
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(N, D, generator=g), torch.randn(N, D, generator=g)) for _ in range(2)]
    x, y = (Moments.of(torch.cat(side).numpy()) for side in zip(*batches, strict=True))
    coder: dict[str, Any] = {"kind": Kind.transcoder, "k": K, "width": M, **options.pop("coder", {})}
    loop = LoopConfig(tokens=3 * N, batch_tokens=N, dead_tokens=N, **options.pop("train", {}))
    cfg = TrainConfig(coder=CoderConfig(**coder), train=loop, **options)
    return Learner(cfg, x, y, 3, "cpu"), batches


CASES: dict[str, dict[str, Any]] = {
    "transcoder": {},
    "sae": {"coder": {"kind": Kind.sae}},
    "skip": {"coder": {"kind": Kind.skip_transcoder}},
    "groupmax": {"coder": {"activation": "groupmax"}},
    "batchtopk": {"coder": {"activation": "batchtopk"}},
    "batchtopk, bfloat16": {
        "coder": {"activation": "batchtopk"},
        "encode": EncodeConfig(mode=EncodeMode.bfloat16, nominated=4.0, chunk_bytes=5 * 2 * 48),
    },
    "matryoshka": {"coder": {"prefixes": [10, 25]}},
    "multi_topk": {"loss": LossConfig(multi_topk=True)},
    "both": {"loss": LossConfig(multi_topk=True), "coder": {"prefixes": [10, 25]}},
    "auxk": {"loss": LossConfig(auxk=1 / 32)},
    "signum": {"optim": OptimConfig(name=OptimName.signum)},
    "signum, sae": {"optim": OptimConfig(name=OptimName.signum), "coder": {"kind": Kind.sae}},
    "bfloat16": {"encode": EncodeConfig(mode=EncodeMode.bfloat16, nominated=4.0)},
    "fp8": {"encode": EncodeConfig(mode=EncodeMode.fp8, nominated=4.0)},
    "micro-batches": {"train": {"micro_batches": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_and_the_weights_are_a_cpus(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerance: a step of Adam or signum is as large as its rate (2.4e-3 here) whatever the gradient, so a gradient of
    rounding alone may differ by a whole one; all but a few weights must agree a thousand times better."""
    options = {"encode": EncodeConfig(mode=EncodeMode.float32), **CASES[case]}
    (here, batches), (reference, _) = learner(**options), learner(**options)
    losses = []
    for x, y in batches:
        x_scaled, y_scaled = here._scaled(x, y)
        here.optimiser.set_rate(1.0)
        with NoWaits():
            losses.append(here._move(x_scaled, y_scaled, N))
        here.step_number += 1
        with monkeypatch.context() as patch:
            patch.setattr(backend, "ON_CPU", False)
            reference.optimiser.set_rate(1.0)
            expected = reference._move(x_scaled, y_scaled, N)
        for name, value in losses[-1].items():
            torch.testing.assert_close(
                value, expected[name].to(value.dtype), rtol=1e-3, atol=1e-5, msg=f"{name} {value}"
            )
    assert torch.equal(here.since_fired_M, reference.since_fired_M)
    for (name, mine), theirs in zip(here.coder.named_parameters(), reference.coder.parameters(), strict=True):
        off = (mine - theirs).abs() > 3e-6
        assert off.double().mean() < 0.02, f"{name}: {int(off.sum())} of {off.numel()} differ"


@pytest.mark.parametrize("case", ["skip", "sae", "micro-batches"])
def test_inputs_that_bfloat16_holds_give_the_same_bits_from_half_the_bytes(case: str) -> None:
    ends = []
    for halved in (False, True):
        one, batches = learner(**CASES[case])
        one.in_bfloat16 = halved
        for x, y in batches:
            one.step(x.bfloat16().float(), y, N)
        ends.append([p.detach() for p in one.coder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_test_finds_waits() -> None:
    values = torch.arange(3.0)
    for wait in (lambda: values[values > 1], lambda: float(values.sum()), lambda: values.nonzero()):
        with NoWaits(), pytest.raises(AssertionError, match="would wait"):
            wait()


@pytest.mark.parametrize("case", ["transcoder", "sae", "matryoshka", "multi_topk", "signum"])
def test_no_gradient_of_a_matrix_is_written(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from skipcoder.kernels.gpu import latents

    def refuse(*_: Any) -> None:
        raise AssertionError("a matrix of sums was written")

    one, ((x, y), *_) = learner(**CASES[case])
    monkeypatch.setattr(latents, "sum_rows", refuse)
    one.step(x, y, N)
