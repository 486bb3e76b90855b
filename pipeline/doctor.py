"""Look at this machine: what skipcoder finds here, and what will be slow or missing, and why.

python pipeline/doctor.py [FOLDER]      FOLDER: where stores will lie; its disk is timed
"""

import argparse
import importlib.util
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from skipcoder import cli

SLOW_DISK = 200e6
"""Bytes a second below which a disk holds up a capture or a stream on a GPU."""
EXTRAS = {
    "demo": ("gguf", "the default model cannot be read"),
    "explore": ("starlette", "no evals/explore.py"),
    "cloud": ("obstore", "no s3:// and gs:// stores"),
    "saelens": ("sae_lens", "format=saelens is not read back by SAELens itself"),
}
PACKAGES = ("skipcoder", "torch", "transformers", "triton", "zarr", "ray", "numpy")


class Finding(NamedTuple):
    """One line."""

    what: str
    found: str
    warning: str = ""
    """What will be slow or missing, and what to do; "": nothing."""


def findings(folder: Path) -> Iterator[Finding]:
    """Everything there is to say, quick things first."""
    yield Finding("Python", f"{platform.python_version()}, {platform.platform(terse=True)}")
    yield Finding("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    for extra, (module, lacking) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(f"extra {extra}", "not installed", f"{lacking}: pip install 'skipcoder[{extra}]'")
    yield from _processor()
    yield from _gpus()
    yield _disk(folder)
    yield _ray()
    yield _hub()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _processor() -> Iterator[Finding]:
    import psutil
    import torch

    has = torch.backends.cpu.get_cpu_capability()
    facts: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    useful = [name for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16") if facts.get(name)]
    slow = ""
    if platform.machine() == "x86_64" and not (facts.get("avx512_bf16") or facts.get("amx_bf16")):
        slow = "no bfloat16 instructions: models capture less than half as fast as with them (docs/costs.md)"
    found = f"{torch.get_num_threads()} threads, {has}{': ' if useful else ''}{', '.join(useful)}"
    yield Finding("processor", found, slow)
    memory = psutil.virtual_memory()
    little = "" if memory.available > 6 * 2**30 else "less than 6 GiB free: lower stream.pool_chunks and widths"
    yield Finding("memory", f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free", little)


def _gpus() -> Iterator[Finding]:
    import torch

    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        old = "" if facts.major >= 8 else "older than sm_80: the kernels were not compiled for it"
        found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
        yield Finding(f"GPU {number}", found, old)
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        reason = f"torch is built for {build}, but finds none" if build else "torch is a build without GPUs"
        yield Finding("GPU", f"none ({reason})", "captures and training run on the processor")


def _disk(folder: Path) -> Finding:
    """The time to write 256 MiB to the disk."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    block = os.urandom(2**20)
    try:
        speed = _speed(folder, block)
    except OSError as error:
        return Finding("disk", f"{folder}: {error.strerror}", "no store can be written there; name another folder")
    status = os.statvfs(folder)
    found = f"{folder}: {speed / 1e6:,.0f} MB/s written, {status.f_bavail * status.f_frsize / 1e9:,.0f} GB free"
    return Finding("disk", found, "" if speed > SLOW_DISK else "slow: a GPU would wait for it; name a faster folder")


def _speed(folder: Path, block: bytes) -> float:
    """Bytes a second."""
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(256):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 2**28 / (time.perf_counter() - began)


def _ray() -> Finding:
    began = time.perf_counter()
    try:
        import ray
    except ImportError as error:
        return Finding("Ray", f"cannot be imported ({error})", "captures need it: pip install 'ray[data]'")
    address = os.environ.get("RAY_ADDRESS")
    cluster = f"; RAY_ADDRESS={address}" if address else "; captures start it on this machine"
    return Finding("Ray", f"{ray.__version__}, imported in {time.perf_counter() - began:.1f} s{cluster}")


def _hub() -> Finding:
    """Whether the Hugging Face Hub answers, and as whom."""
    import httpx
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "HF_HUB_OFFLINE is set", "only models and data in the cache, or on disk")
    try:
        httpx.head(constants.ENDPOINT, timeout=5)
    except httpx.HTTPError as error:
        return Finding("hub", f"no answer ({type(error).__name__})", "only models and data in the cache, or on disk")
    token = get_token()
    return Finding("hub", "answers", "" if token else "no token: gated models need `hf auth login`")


def main() -> int:
    """Print the findings; those with a warning are marked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="stores", type=Path)
    for one in findings(parser.parse_args().folder):
        print(f"{'!' if one.warning else ' '} {one.what:<15}{one.found}", flush=True)
        if one.warning:
            print(f"  {'':<15}{one.warning}", flush=True)
    return cli.DONE


def cli_main() -> None:
    """Console script `skipcoder-doctor`."""
    sys.exit(cli.run(main))


if __name__ == "__main__":
    cli_main()
