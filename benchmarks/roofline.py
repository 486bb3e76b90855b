"""FLOPs and bytes of a training step's operations against an H100's limits, at the shapes of real models.

    python benchmarks/roofline.py [--out FILE]

Arithmetic only: it says what no implementation can beat, not what ours reaches (`make gpu-check` measures that).
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from shapes import SHAPES, Shape

BF16_FLOPS, FP8_FLOPS, BYTES = 989e12, 1979e12, 3.35e12
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
    """A transcoder's step as kernels/gpu/ makes it: float32 parameters, bfloat16 encoder product, Adam."""
    n, d, m, k = shape
    row, table, gathered = 4 * d, 4 * m * d, 4 * n * k * d
    product, pre = 2 * n * m * d, 2 * n * m
    return [
        Operation("encoder weights in bf16, written by the optimiser", 0, 0.5 * table),
        Operation("encoder product, pre-activations written", product, table / 2 + n * row / 2 + pre),
        Operation("(instead: weights to fp8)", 0, 1.25 * table),
        Operation("(and the product in fp8)", product, table / 4 + n * row / 4 + pre, FP8_FLOPS),
        Operation("maxima of groups of 32", 0, pre + pre / 32),
        Operation("the best groups, their best elements", 0, pre / 32 + n * 1.25 * k * (64 + 12)),
        Operation("exact values of 1.25 k latents", 2.5 * n * k * d, 1.25 * gathered + n * row),
        Operation("their ranks; entries sorted by latent", 0, n * k * (1.25 * 24 + 8 * 12)),
        Operation("decode and error", 2 * n * k * d, gathered + 2 * n * row),
        Operation("decoder: gradients of values, lengths of sums", 4 * n * k * d, gathered + table),
        Operation("encoder: lengths of sums", 2 * n * k * d, gathered),
        Operation("Adam on the decoder, sums formed again", 2 * n * k * d, 6 * table + gathered),
        Operation("Adam on the encoder, sums formed again", 2 * n * k * d, 6 * table + gathered),
        Operation("(if gradients were written: sums, norm, Adam)", 4 * n * k * d, 2 * (gathered + 9 * table)),
    ]


def report() -> str:
    """Tables in Markdown."""
    lines = [
        "# Roofline", "",
        "What a training step of a transcoder must compute and move on an H100 SXM (989 TFLOP/s dense bf16, 1979 "
        "TFLOP/s fp8, 3.35 TB/s, 50 MB L2), by `benchmarks/roofline.py`. These are bounds, not measurements. Gathered "
        "rows count as if none came from the L2 cache; where the table of rows fits there, the bound is too high. "
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

- The encoder's product is nearly all of the FLOPs. Writing its result to memory and reading it once costs less than
  reading the encoder's weights again for every chunk that would fit the L2 cache: on an H200 a step of 131,072 latents
  took 45.6 ms with chunks of 2^24 elements and 21.5 ms with 2^30. So `encode.chunk_bytes` is 2 GiB there.
- Everything else is bound by memory. Rows are gathered six times in a step; the last two, in the optimiser, where
  latents have fewer than nine tokens: forming their sums a second time then moves fewer bytes than writing and reading
  a matrix. Four of the six gather rows of inputs or errors, tables of N rows that mostly stay in the L2 cache; two
  gather rows of weights.
- One list of entries by latent serves all sums, so nothing needs atomics.

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
tiles changes the order of a sum, so results would differ from run to run. Tiles and warps were chosen once, on an H100:
one warp takes 512 or 1,024 bytes of a row, and programs of one tile follow each other, so that a tile of all rows stays
in the L2 cache. Every thread loads 16 bytes at a time, as `benchmarks/compile_report.md` shows.
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
