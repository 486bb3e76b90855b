"""Compile every Triton kernel for GPUs that are not here and report what the compilers say.

    python benchmarks/compile_report.py [--out FILE]

For sm_80, sm_90 and gfx942, with the arguments of the real launches at the shapes of real models (the launchers run on
tensors without data, and what they would have launched is compiled): the most registers, spilled bytes and shared
memory at any shape, and whether anything is loaded in 128-bit pieces. The CUDA figures are cuobjdump's (from the triton
wheel), the AMD ones the compiler's own metadata in the assembly. Compiling says nothing about speed.
"""

import argparse
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from shapes import SHAPES, Shape
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skipcoder.kernels import backend
from skipcoder.kernels.gpu import batch, candidates, latents, quantise, rows, update
from skipcoder.kernels.rows import by_latent

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
backend.ON_CPU = True  # tensors without data, which are on no GPU either, go to the launchers
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.int16: "i16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e4m3fnuz: "fp8e4b8", torch.uint8: "u8",
}  # fmt: skip


class Launch(NamedTuple):
    """What a launcher asks of the compiler."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    """Arguments that are multiples of 16, as torch's pointers and most widths are."""
    warps: int


def launches(call: Callable[[], object], warp: int) -> list[Launch]:
    """The launches of a call on tensors without data, on a GPU whose warps have `warp` threads."""
    found = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **constants: Any) -> None:
        signature, divisible = {}, []
        values = dict(zip(kernel.arg_names, args, strict=False)) | constants
        for i, (name, value) in enumerate(values.items()):
            if kernel.params[i].is_constexpr:
                signature[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
                divisible.append(i)
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                divisible += [i] if isinstance(value, int) and value % 16 == 0 else []
        found.append(Launch(kernel, signature, constants, tuple(divisible), num_warps))

    with ExitStack() as patches:
        patches.enter_context(patch.object(triton.JITFunction, "run", record))
        patches.enter_context(patch.object(rows, "row_tile", partial(rows.row_tile, warp=warp)))
        for module in (candidates, rows, quantise, update):
            patches.enter_context(patch.object(module, "num_warps", partial(module.num_warps, warp=warp)))
        call()
    return found


def calls(shape: Shape, dtype: torch.dtype, amd: bool) -> list[Callable[[], object]]:
    """Every operation of kernels/gpu/ at one shape, on tensors without data."""
    n, d, m, k = shape
    c = math.ceil(1.25 * k)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    pre, x, W = empty(n, m, dtype=dtype), empty(n, d, dtype=dtype), empty(m, d, dtype=dtype)
    columns, indices = empty(n, c, dtype=torch.int64), empty(n, k, dtype=torch.int64)
    values, one, p = empty(n, k), empty(), empty(m, d)
    order = by_latent(indices, m)
    calls: list[Callable[[], object]] = []
    for unit, keep in itertools.product((False, True), repeat=2):
        half = None if keep else empty(m, d, dtype=torch.bfloat16)
        sums, args = (empty(9, d), p if keep else None, half), (order, values, x)
        calls += [
            partial(latents.measure, *args, one, p, unit, keep),
            partial(update.adam_rows, p, p, p, *args, *sums, one, one, 0.1, 0.1, 1e-8, unit),
            partial(update.sign_rows, p, p, *args, *sums, one, one, unit),
        ]
    in_8_bits = empty(m, d, dtype=torch.float8_e4m3fnuz if amd else torch.float8_e4m3fn)
    bias_out = empty(m, dtype=torch.bfloat16)
    calls += [partial(quantise.quantise, p, in_8_bits, empty(m), empty(d), b, bias_out) for b in (None, empty(m))]
    return [
        *calls,
        lambda: candidates.candidates(pre, c),
        lambda: batch.largest_of_batch(pre, c * n),
        lambda: batch.largest(empty(c * n), k * n),
        lambda: candidates.two_of_groups(pre, k),
        lambda: candidates.rank(empty(n, c), columns, k),
        lambda: rows.gather_sum(indices, values, W, None, x),
        lambda: rows.gather_dot(x, W, columns, None, empty(m)),
        lambda: rows.errors(indices, values, W, None, x, x, None, 1),
        lambda: rows.errors(indices, values, W, None, x, x, indices, 3),
        lambda: latents.measure(order, values, x),
        lambda: latents.sum_rows(order, values, x),
        lambda: update.sign_step(p, p, p, one),
    ]


def compile_one(launch: Launch, target: str) -> dict[str, Any]:
    """Registers, spills, shared memory and 128-bit loads of one kernel on one target."""
    aligned = {(i,): [["tt.divisibility", 16]] for i in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": launch.warps})
    facts: dict[str, Any] = {"shared": built.metadata.shared}
    if target.startswith("sm"):
        usage = _cuobjdump(built.asm["cubin"])
        facts |= {"registers": usage["REG"], "spill": usage["LOCAL"] + usage["STACK"]}
        facts["wide"] = bool(re.search(r"ld\.global\S*\.v4\.b32", built.asm["ptx"]))
    else:
        text = built.asm["amdgcn"]
        facts["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        facts["spill"] = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        facts["wide"] = bool(re.search(r"(buffer|global)_load_dwordx4", text))
    return facts


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def report() -> tuple[str, int]:
    """The table in Markdown, and the number of kernels that spill."""
    lines = [f"triton {triton.__version__}, from the script `benchmarks/compile_report.py`; no GPU was used.", ""]
    lines += [f"The most of {len(SHAPES)} shapes ({', '.join(SHAPES)}).", ""]
    lines += ["| kernel | rows | target | registers | spill | shared B | 128-bit loads |", "|" + "---|" * 7]
    most: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for shape in SHAPES.values():
        for dtype in (torch.float32, torch.bfloat16):
            for target, (_, _, warp) in TARGETS.items():
                for call in calls(shape, dtype, target.startswith("gfx")):
                    for launch in launches(call, warp):
                        if launch.kernel is quantise.quantise_kernel and target == "sm_80":
                            continue  # it has no 8-bit floats
                        name = launch.kernel.__name__.removesuffix("_kernel")
                        most.setdefault((name, TYPES[dtype], target), []).append(compile_one(launch, target))
    spilling = 0
    for key, facts in sorted(most.items()):
        registers, spill, shared = (max(f[name] for f in facts) for name in ("registers", "spill", "shared"))
        spilling += spill > 0
        wide = "yes" if all(f["wide"] for f in facts) else "no"
        lines.append("| " + " | ".join(map(str, (*key, registers, spill, shared, wide))) + " |")
    return "\n".join(lines) + "\n", spilling


def main() -> int:
    """Print or write the table; exit 1 if anything spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table here instead of printing it")
    args = parser.parse_args()
    table, spilling = report()
    if args.out:
        args.out.write_text("# What the compilers say\n\n" + table)
    else:
        print(table)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
