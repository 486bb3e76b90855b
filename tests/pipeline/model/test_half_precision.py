"""Half precision on CPUs without instructions for it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from skipcoder.pipeline.config import Dtype, ModelConfig
from skipcoder.pipeline.model import half_precision as halves
from skipcoder.pipeline.model import load as model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_sums_are_float32_and_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    d_in = 700
    linear = nn.Linear(d_in, 50, bias).to(dtype)
    halves.widen(holder := nn.Sequential(linear))
    x_BTD = torch.randn(2, 9, d_in, dtype=dtype)
    found = holder(x_BTD)
    assert found.dtype == dtype and type(holder[0]) is halves.WideLinear
    exact = nn.functional.linear(
        x_BTD.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )
    # One rounding to dtype, half of its spacing; and a float32 sum of d_in + 1 terms in any order.
    magnitude = x_BTD.double().abs() @ linear.weight.double().abs().T + 1
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + (d_in + 1) * 2**-24 * magnitude * (1 + torch.finfo(dtype).eps)
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("dtype", Dtype)
def test_models_are_widened_where_the_cpu_wants_it(
    supported: bool, dtype: Dtype, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, op, lambda: supported)
    lm = model.load_causal_lm(ModelConfig(name="tiny", id=str(tiny_model), dtype=dtype), "cpu")
    kinds = {type(module) for module in lm.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear if supported or dtype is Dtype.float32 else halves.WideLinear}
    assert {p.dtype for p in lm.parameters()} == {getattr(torch, dtype.value)}
