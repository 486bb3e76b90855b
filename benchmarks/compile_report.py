"""Compile every Triton kernel for GPUs that are not here and report what the compilers say.

    python benchmarks/compile_report.py [--out FILE]

For sm_80, sm_90 and gfx942, at the widths of real models: registers, spills (bytes), shared memory, and whether rows
are loaded in 128-bit pieces. The CUDA figures are cuobjdump's (from the triton wheel), the AMD ones the compiler's own
metadata in the assembly. Compiling says nothing about speed.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from shapes import SHAPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skipcoder.kernels.gpu import candidates, rows, update

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = ("fp32", "bf16")


def kernels(
    d: int, m: int, k: int, dtype: str, warp: int
) -> list[tuple[str, Any, dict[str, str], dict[str, int], int]]:
    """(name, kernel, types of its arguments, constants, warps) as the launchers in kernels/gpu/ use them."""
    tile = rows.block_d(d)
    warps = rows.num_warps(tile, 2 if dtype == "bf16" else 4, warp)
    groups = candidates.groups(m, math.ceil(1.25 * k))
    i64, f32, row = "*i64", "*fp32", f"*{dtype}"
    segments = dict.fromkeys(("start_ptr", "count_ptr", "segments_ptr", "before_ptr", "partial_before_ptr"), i64)
    return [
        (
            "gather_sum",
            rows.gather_sum_kernel,
            {"index_ptr": i64, "weight_ptr": f32, "W_ptr": row, "offset_ptr": i64, "base_ptr": row, "out_ptr": row}
            | {"D": "i32", "K": "i32", "N": "i32", "L": "i32"},
            {"RAGGED": 0, "BASE": 2, "BLOCK_D": tile},
            warps,
        ),
        (
            "gather_dot",
            rows.gather_dot_kernel,
            {"x_ptr": row, "W_ptr": row, "index_ptr": i64, "token_ptr": i64, "out_ptr": row} | {"D": "i32", "L": "i32"},
            {"BLOCK_L": 8, "BLOCK_D": min(256, tile)},
            4,
        ),
        (
            "segment_sum",
            rows.segment_sum_kernel,
            {"latent_ptr": i64, "token_ptr": i64, "weight_ptr": f32, "rows_ptr": row, **segments}
            | {"out_ptr": f32, "partial_ptr": f32, "M": "i32", "D": "i32"},
            {"SEGMENT": rows.SEGMENT, "BLOCK_D": tile},
            warps,
        ),
        (
            "combine",
            rows.combine_kernel,
            {"partial_ptr": f32, "segments_ptr": i64, "partial_before_ptr": i64, "out_ptr": f32, "D": "i32"},
            {"BLOCK_D": tile},
            rows.num_warps(tile, 4, warp),
        ),
        (
            "candidates",
            candidates.candidates_kernel,
            {"pre_ptr": row, "out_ptr": i64, "M": "i32", "C": "i32", "P": "i32"},
            {"GROUPS": groups, "LOW_BIT": 16 if dtype == "bf16" else 0},
            candidates.num_warps(groups, warp),
        ),
        (
            "sign_step",
            update.sign_step_kernel,
            {"y_ptr": f32, "z_ptr": f32, "grad_ptr": f32, "count": "i32", "lr": "fp32", "y_lr": "fp32", "c": "fp32"},
            {"BLOCK": update.BLOCK},
            4,
        ),
    ]


def compile_one(
    kernel: Any, types: dict[str, str], constants: dict[str, int], warps: int, target: str
) -> dict[str, Any]:
    """Registers, spills, shared memory and 128-bit loads of one kernel on one target."""
    signature = types | dict.fromkeys(constants, "constexpr")
    # What the launcher sees at run time: torch's pointers and all our widths are multiples of 16.
    names = list(signature)
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]] for n in types if n.endswith("_ptr") or n in ("D", "M", "count")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps})
    facts: dict[str, Any] = {"shared": built.metadata.shared}
    if target.startswith("sm"):
        usage = _cuobjdump(built.asm["cubin"])
        facts |= {"registers": usage["REG"], "spill": usage["LOCAL"] + usage["STACK"]}
        facts["128-bit loads"] = bool(re.search(r"ld\.global\S*\.v4\.b32", built.asm["ptx"]))
    else:
        text = built.asm["amdgcn"]
        facts["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        facts["spill"] = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        facts["128-bit loads"] = bool(re.search(r"(buffer|global)_load_dwordx4", text))
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
    lines += ["| kernel | dtype | width | target | registers | spill | shared B | 128-bit loads |", "|" + "---|" * 8]
    spilling = 0
    for model, (_, d, m, k) in SHAPES.items():
        for dtype in DTYPES:
            for target, (_, _, warp) in TARGETS.items():
                for name, kernel, types, constants, warps in kernels(d, m, k, dtype, warp):
                    facts = compile_one(kernel, types, constants, warps, target)
                    spilling += facts["spill"] > 0
                    cells = (name, dtype, f"{d} ({model})", target, facts["registers"], facts["spill"])
                    wide = "yes" if facts["128-bit loads"] else "no"
                    lines.append("| " + " | ".join(map(str, (*cells, facts["shared"], wide))) + " |")
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
