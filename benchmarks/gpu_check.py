"""Is the training step right on this GPU, how fast is it, and where does its time go? One dated Markdown and JSON file.

    make gpu-check            (= the kernel tests on the device, then this script)
    python benchmarks/gpu_check.py --out benchmarks/ [--shapes NAME ...] [--sections steps profile ...]

Sections: right (operations against float64, recall by mode, graph against eager bits, no waits), steps (whole steps of
every shape beside eai-sparsify where it is installed, dense torch and the bare product), variants (activations and
losses beside plain top-k), bank (eight coders), profile (device time by kernel). Contenders take turns; a turn queues
several steps and waits once, as training does; medians of the turns. `--device cpu --tiny` tries all of it without a
GPU.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gpu_contenders as contenders
import torch
from gpu_contenders import Pairs, Step
from gpu_right import right
from shapes import SHAPES, TINY, Shape

from skipcoder.kernels.preactivations import MODES
from skipcoder.trainer.coder.encoding import available, recall
from skipcoder.trainer.config import EncodeConfig, EncodeMode, LossConfig

GIB, SMALL = 2**30, 2**28
VARIANTS: dict[str, dict[str, Any]] = {
    "top-k": {},
    "skip transcoder": {"kind": "skip_transcoder"},
    "sae": {"kind": "sae"},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"},
    "groupmax": {"activation": "groupmax"},
    "matryoshka": {"prefixes": "quarters"},
    "multi-top-k": {"loss": LossConfig(multi_topk=True)},
    "auxk, none dead": {"loss": LossConfig(auxk=1 / 32)},
    "auxk": {"loss": LossConfig(auxk=1 / 32)},
}


class Clock:
    """Times steps on one device."""

    def __init__(self, device: str, rounds: int, queued: int) -> None:
        self.device, self.rounds, self.queued = device, rounds, queued

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def turn(self, step: Step) -> float:
        """Milliseconds a step when some are queued."""
        self.wait()
        begun = time.perf_counter()
        for _ in range(self.queued):
            step()
        self.wait()
        return 1e3 * (time.perf_counter() - begun) / self.queued

    def medians(self, steps: Mapping[str, Step]) -> dict[str, float]:
        """Median milliseconds of each, in turn."""
        turns: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.rounds):
            for name, step in steps.items():
                turns[name].append(self.turn(step))
        return {name: round(statistics.median(each), 3) for name, each in turns.items()}

    def peak_gib(self, make: Callable[[], Step]) -> tuple[Step, float | None]:
        """A step, made and warmed up, and the most memory that took."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step = make()
        for _ in range(4):
            step()
        self.wait()
        if self.device != "cuda":
            return step, None
        return step, round((torch.cuda.max_memory_allocated() - before) / GIB, 2)


def steps(shape: Shape, clock: Clock) -> dict[str, Any]:
    """Whole steps of one shape: {contender: milliseconds, peak memory, recall}."""
    pairs = Pairs(shape, clock.device)
    peaks: dict[str, float | None] = {}
    forms: dict[str, Step] = {}
    one: Any = None

    def make() -> Step:
        nonlocal one
        one = contenders.learner(pairs)
        return contenders.ours(pairs, one)

    _, peak = clock.peak_gib(make)
    graphs = one.graphs

    def mode_of(mode: str, graphed: bool) -> Step:
        def step() -> object:
            one.coder.search = one.coder.search._replace(mode=mode)
            one.graphs = graphs if graphed else None
            return one.step(pairs.x, pairs.y, shape.n)

        return step

    def other(encode: EncodeConfig) -> Step:
        return contenders.ours(pairs, contenders.learner(pairs, encode=encode))

    default = one.coder.search.mode
    makes: dict[str, Callable[[], Step]] = {f"ours ({default})": lambda: mode_of(default, True)}
    if clock.device == "cuda":
        makes["ours, eager"] = lambda: mode_of(default, False)
    for mode in MODES:
        if mode == default or not available(mode, clock.device):
            continue
        makes[f"ours, {mode}"] = partial(mode_of, mode, True)
        if mode == "bfloat16":  # its own, as it holds the encoder twice
            makes[f"ours, {mode}"] = lambda: other(EncodeConfig(mode=EncodeMode.bfloat16))
    if 2 * shape.n * shape.m > SMALL:
        makes["ours, 256 MiB of pre-activations"] = lambda: other(EncodeConfig(chunk_bytes=SMALL))
    makes |= {"bare bf16 product": lambda: contenders.gemm(pairs), "dense torch": lambda: contenders.dense(pairs)}
    if contenders.has_sparsify():
        makes["eai-sparsify"] = lambda: contenders.sparsify(pairs)
    for name, form in makes.items():
        try:
            forms[name], peaks[name] = clock.peak_gib(form)
        except torch.OutOfMemoryError:
            peaks[name] = None
            torch.cuda.empty_cache()
    peaks[f"ours ({default})"] = peak  # the others of ours use the same weights: only what they add was seen
    recalls = {}
    for mode in MODES:
        if available(mode, clock.device):
            one.coder.search = one.coder.search._replace(mode=mode)
            recalls[mode] = round(recall(one.coder, pairs.x, 256), 6)
    parameters = sum(p.numel() * 12 for p in one.coder.parameters()) / GIB  # weights and both moments
    return {"ms": clock.medians(forms), "peak_gib": peaks, "recall": recalls, "state_gib": round(parameters, 2)}


def variants(shape: Shape, clock: Clock) -> dict[str, Any]:
    """Milliseconds of each activation and loss."""
    pairs = Pairs(shape, clock.device)
    forms: dict[str, Step] = {}
    for name, options in VARIANTS.items():
        if options.get("prefixes"):
            options = {"prefixes": [shape.m // 4, shape.m // 2, 3 * shape.m // 4]}
        one = contenders.learner(pairs, **options)
        if name == "auxk":  # what is dead is looked for in the first step
            one.since_fired_M[: shape.m // 10] = 10**12
        forms[name], _ = clock.peak_gib(partial(contenders.ours, pairs, one))
    return {"ms": clock.medians(forms)}


def bank(shape: Shape, clock: Clock) -> dict[str, Any]:
    """Milliseconds of one coder's step, and of eight coders' on the same batch."""
    pairs = Pairs(shape, clock.device)
    eight = [contenders.ours(pairs, contenders.learner(pairs)) for _ in range(8)]

    def together() -> None:
        for step in eight:
            step()

    for _ in range(4):
        together()
    found = clock.medians({"one": eight[0], "eight": together})
    return {"ms": found, "coder_tokens_per_s": round(8e3 * shape.n / found["eight"])}


def profile(shape: Shape, clock: Clock, count: int = 3) -> dict[str, Any]:
    """Device milliseconds a step of each kernel of an eager step, the longest first."""
    pairs = Pairs(shape, clock.device)
    one = contenders.learner(pairs)
    one.graphs = None
    step = contenders.ours(pairs, one)
    for _ in range(3):
        step()
    clock.wait()
    on_gpu = clock.device == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        for _ in range(count):
            step()
        clock.wait()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, field) / count / 1e3 for event in seen.key_averages()}
    longest = sorted(((ms, name) for name, ms in times.items() if ms > 0), reverse=True)
    launches = sum(event.count for event in seen.key_averages() if getattr(event, field) > 0) // count
    kernels = {name[:90]: round(ms, 3) for ms, name in longest[:24]}
    return {"busy_ms": round(sum(times.values()), 3), "launches": launches, "kernels": kernels}


def markdown(found: dict[str, Any]) -> str:
    """The report."""
    lines = [f"# The training step on {found['machine']}", "", f"{found['date']}, torch {found['torch']}, triton "]
    lines[-1] += f"{found['triton']}, commit {found['commit']}. Written by `benchmarks/gpu_check.py`."
    lines += ["", *(f"**Failed:** {line}" for line in found["failed"])] if found["failed"] else []
    for name, shape in found["shapes"].items():
        n, d, m, k = shape["shape"]
        lines += ["", f"## {name}: {n} tokens, d {d}, {m} latents, k {k}", ""]
        lines += [f"- {line}" for line in shape.get("right", [])]
        if "steps" in shape:
            ms, peaks = shape["steps"]["ms"], shape["steps"]["peak_gib"]
            mine, bare = next(iter(ms.values())), ms["bare bf16 product"]
            state = shape["steps"]["state_gib"]
            lines += ["", f"Weights and Adam's moments take {state} GiB.", ""]
            lines += ["| step | ms | / ours | / bare product | peak GiB |", "|---|---|---|---|---|"]
            for form, peak in peaks.items():
                cells = [f"{ms[form]:.3f}", f"{ms[form] / mine:.2f}", f"{ms[form] / bare:.2f}"] if form in ms else []
                lines.append(f"| {form} | {' | '.join(cells or ['out of memory', '', ''])} | {peak or ''} |")
            recalls = ", ".join(f"{mode} {value}" for mode, value in shape["steps"]["recall"].items())
            lines += ["", f"Recall of the float32 choice on these random pairs: {recalls}."]
        if "variants" in shape:
            ms = shape["variants"]["ms"]
            lines += ["", "| variant | ms | / top-k |", "|---|---|---|"]
            lines += [f"| {form} | {value:.3f} | {value / ms['top-k']:.2f} |" for form, value in ms.items()]
        if "bank" in shape:
            ms = shape["bank"]["ms"]
            lines += ["", f"Eight coders: {ms['eight'] / ms['one']:.2f} times one's step, "]
            lines[-1] += f"{shape['bank']['coder_tokens_per_s']:,} coder-tokens/s."
        if "profile" in shape:
            lines += ["", f"An eager step, {shape['profile']['launches']} launches:", ""]
            lines += ["| kernel | ms |", "|---|---|"]
            longest = list(shape["profile"]["kernels"].items())[:12]  # more are in the JSON file
            lines += [f"| `{kernel}` | {ms} |" for kernel, ms in longest]
            lines += [f"| all | {shape['profile']['busy_ms']} |"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="one small shape, to try the script itself")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queued", type=int, default=10, help="steps of a turn")
    parser.add_argument("--shapes", nargs="*", help="names in shapes.py; all by default")
    parser.add_argument("--sections", nargs="*", default=["right", "steps", "variants", "bank", "profile"])
    parser.add_argument("--commit", default="unknown", help="for the report")
    parser.add_argument("--out", type=Path, help="folder for the dated files; without it, print only")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; try --device cpu --tiny", file=sys.stderr)
        return 2
    import triton

    shapes = TINY if args.tiny else {name: s for name, s in SHAPES.items() if not args.shapes or name in args.shapes}
    clock = Clock(args.device, args.rounds, args.queued)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    found: dict[str, Any] = {
        "machine": machine, "date": str(datetime.date.today()), "torch": torch.__version__,
        "triton": triton.__version__, "commit": args.commit, "failed": [],
        "shapes": {},
    }  # fmt: skip
    sections: dict[str, Callable[[Shape, Clock], Any]] = {
        "right": lambda shape, clock: right(shape, clock.device), "steps": steps, "variants": variants, "bank": bank,
        "profile": profile,
    }  # fmt: skip
    stem = f"gpu_check-{machine.replace(' ', '-')}-{found['date']}"
    for name, shape in shapes.items():
        here = found["shapes"][name] = {"shape": list(shape)}
        for section in args.sections:
            if section in ("variants", "bank") and shape.m > 2**15:
                continue
            begun = time.perf_counter()
            try:
                here[section] = sections[section](shape, clock)
            except Exception as error:  # what comes after may still be measured
                found["failed"].append(f"{name}, {section}: {type(error).__name__}: {str(error).splitlines()[0]}")
                traceback.print_exc()
            print(f"{name}: {section} took {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()
            if args.out:  # after every section, so that a time limit loses little
                (args.out / f"{stem}.md").write_text(markdown(found))
                (args.out / f"{stem}.json").write_text(json.dumps(found, indent=1))
    print(markdown(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
