"""FLOPs and bytes of a training step's operations against an H100's limits, at the shapes of real models.

    python benchmarks/roofline.py [--out FILE]

Arithmetic only: it says what no implementation can beat, not what ours reaches (`make gpu-check` measures that).
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from shapes import SHAPES, Shape

BF16_FLOPS, INT8_OPS, BYTES = 989e12, 1979e12, 3.35e12
"""H100 SXM, dense, per second (NVIDIA's data sheet)."""
L2 = 50e6


class Operation(NamedTuple):
    """What one operation must compute and move."""

    name: str
    flops: float
    moved: float
    """Bytes to or from memory if nothing stays in cache but chunks of pre-activations."""
    peak: float = BF16_FLOPS

    @property
    def seconds(self) -> float:
        """The larger of both limits."""
        return max(self.flops / self.peak, self.moved / BYTES)


def operations(shape: Shape) -> list[Operation]:
    """A transcoder's step: float32 parameters, bfloat16 encoder product, Adam."""
    n, d, m, k = shape
    row, table, gathered = 4 * d, 4 * m * d, 4 * n * k * d
    product = 2 * n * m * d
    return [
        Operation("encoder weights to bf16", 0, 1.5 * table),
        Operation("encoder product, bf16", product, table / 2 + n * row / 2),
        Operation("(instead: int8)", product, table / 4 + n * row / 4, INT8_OPS),
        Operation("(if pre-activations went to memory)", product, table / 2 + 3 * 2 * n * m),
        Operation("exact values of 1.25 k latents", 2.5 * n * k * d, 1.25 * gathered + n * row),
        Operation("decode", 2 * n * k * d, gathered + n * row),
        Operation("gradient of values", 2 * n * k * d, gathered + n * row),
        Operation("gradient of W_dec", 2 * n * k * d, gathered + table),
        Operation("gradient of W_enc", 2 * n * k * d, gathered + table),
        Operation("clip: norm, then scale", 0, 2 * 3 * table),
        Operation("Adam: p, g, m, v in; p, m, v out", 0, 2 * 7 * table),
        Operation("(instead: schedule-free sign)", 0, 2 * 5 * table),
    ]


def report() -> str:
    """Tables in Markdown."""
    lines = [
        "# Roofline", "",
        "What a training step of a transcoder must compute and move on an H100 SXM (989 TFLOP/s dense bf16, 1979 TOP/s "
        "int8, 3.35 TB/s, 50 MB L2), by `benchmarks/roofline.py`. These are bounds, not measurements. Gathered rows "
        "count as if none came from the L2 cache; where the table of rows fits there, the bound is too high. "
        "Rows in brackets are alternatives and not in the sum.",
    ]  # fmt: skip
    for model, shape in SHAPES.items():
        every = operations(shape)
        total = sum(o.seconds for o in every if not o.name.startswith("("))
        fits = "fits" if 4 * shape.m * shape.d <= L2 else "does not fit"
        n, d, m, k = shape
        lines += ["", f"## {model}: {n} tokens, d {d}, {m} latents, k {k}", ""]
        lines += [f"A float32 table of rows takes {4 * m * d / 1e6:,.0f} MB and {fits} the L2 cache.", ""]
        lines += ["| operation | GFLOP | MB | bound by | least ms | share |", "|---|---:|---:|---|---:|---:|"]
        for o in every:
            bound = "compute" if o.flops / o.peak > o.moved / BYTES else "memory"
            share = "" if o.name.startswith("(") else f"{o.seconds / total:.0%}"
            numbers = f"{o.flops / 1e9:,.1f} | {o.moved / 1e6:,.0f} | {bound} | {o.seconds * 1e3:.3f}"
            lines.append(f"| {o.name} | {numbers} | {share} |")
        lines.append(f"| **sum** | | | | **{total * 1e3:.3f}** | |")
    return "\n".join(lines) + ANCHORS


ANCHORS = """

## What this says

- The encoder's product is nearly all of the FLOPs; writing the pre-activations to memory and reading them back would
  cost as much again or more. So they are made in chunks that stay in the L2 cache (`encode.chunk_elements`, 2^24 bf16
  elements are 32 MiB) and are read there by the selection.
- Everything else is bound by memory. Rows are gathered four times in a step (five with exact values); one list of
  entries by latent serves both weight gradients, so that each gradient row is written once and never by atomics.
- At small batches the optimiser and the clipping move more than the gathers: larger batches or several coders on one
  stream do not change that, as it is per coder.

## Public anchors

Circuits Landscape, appendix E (EleutherAI): 2^20 rows, 2^19 latents, k 128, d 2048; neither GPU nor dtype is named.

| implementation | forward | backward |
|---|---:|---:|
| torch.sparse.mm, COO | 8.35 s | |
| F.embedding_bag | 1.87 s | |
| torch.sparse.mm, CSR | 0.87 s | 1.96 s |
| OpenAI's kernels (Gao et al.) | 0.84 s | 3.62 s (atomics) |
| xformers_embedding_bag | 0.84 s | 1.81 s |

550 GB of bf16 rows in 0.84 s are 654 GB/s, 94 % of an A40's 696 GB/s: a forward decode is at the bound there, if an A40
it was. The same source reports 47.8 % FLOP utilisation of training on 4 A40 with top-k and 65.3 % with GroupMax: the
selection is where time is left. Flash-SAE's repository reports 1.06x for the encoder and 13.6x for the decoder, the
latter against a dense decoder (RTX 4070).

## Choices that stand in the code

There is no autotuner: which configuration wins would depend on the machine's noise, and the width of `gather_dot`'s
tiles changes the order of a sum, so results would differ from run to run. Tiles and warps follow from one rule, every
thread loads 16 bytes at a time (`gpu.num_warps`); `benchmarks/compile_report.md` shows that it holds. `make gpu-check`
times the decoder's tile width, which changes no result, beside its alternatives.
"""


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    args = parser.parse_args()
    if args.out:
        args.out.write_text(report())
    else:
        print(report())


if __name__ == "__main__":
    main()
