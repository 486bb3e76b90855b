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
N, D, M, K = 8, 16, 30, 3
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
    x, y = (Moments.of(torch.cat(side)) for side in zip(*batches, strict=True))
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
        "encode": EncodeConfig(mode=EncodeMode.bfloat16, nominated=4.0, chunk_bytes=5 * 2 * M),
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
    losses: list[dict[str, torch.Tensor]] = []
    for x, y in batches:
        x_scaled, y_scaled = here._rows(x, y)
        here.has_dead = reference.has_dead = True
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


@pytest.mark.parametrize("case", ["skip", "sae"])
def test_inputs_that_bfloat16_holds_give_the_same_bits_from_half_the_bytes(case: str) -> None:
    ends = []
    for halved in (False, True):
        one, batches = learner(**CASES[case])
        one.in_bfloat16 = halved
        for x, y in batches:
            one.step(x.bfloat16().float(), y, N)
        ends.append([p.detach() for p in one.coder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def is_half_of(half: torch.Tensor, W: torch.Tensor) -> bool:
    """Triton's interpreter cuts off what a GPU would round."""
    cut = (W.detach().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return bool(((half == W.bfloat16()) | (half == cut)).all())


@pytest.mark.parametrize("case", ["transcoder", "signum", "micro-batches"])
def test_the_encoder_in_bfloat16_is_kept_up_to_date(case: str) -> None:
    """By the optimiser, in sums or dense; and after changes from outside by the next step."""
    one, batches = learner(**CASES[case], encode=EncodeConfig(mode=EncodeMode.bfloat16, nominated=4.0))
    for x, y in batches:
        one.step(x, y, N)
        (half,) = one.halves.values()
        assert one.coder.search.W_half_MD is half and is_half_of(half, one.coder.W_enc)
    with torch.no_grad():
        one.coder.W_enc.mul_(2)
    one._keep_half()
    assert is_half_of(half, one.coder.W_enc)
    state = learner(**CASES[case])[0].state_dict()
    one.load_state_dict(state | {"encode_mode": "bfloat16", "optimiser": one.optimiser.state_dict()})
    one._keep_half()
    assert is_half_of(half, one.coder.W_enc)


def test_auxk_begins_where_dead_latents_are_looked_for() -> None:
    one, batches = learner(loss=LossConfig(auxk=1.0), train={"log_every": 2})
    seen = []
    for i in range(4):
        one.since_fired_M[:5] = 10**6  # dead throughout
        x, y = batches[i % 2]
        seen.append(float(one.step(x, y, N)["auxk"]))
        if i == 0:
            one.has_dead = False  # as if they had died just after the look at step 0
    assert seen[0] > 0 and seen[1] == 0 and seen[2] > 0 and seen[3] > 0


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
