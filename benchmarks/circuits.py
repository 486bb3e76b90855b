r"""From a prompt to its graph: how long does it take, part by part, and beside circuit-tracer?

    python benchmarks/circuits.py --set RUNS [--circuit-tracer PYTHON] [--latents 4096] [--rounds 3] \
        [--circuits DIR...] [--json OUT]

RUNS: a folder of runs of all layers (`+experiment=set-smollm2`). Times the passes that make the model linear, the
edges, and loading the page of 3,000 nodes and 150,000 edges in Chromium until a node's edges are drawn.

PYTHON has circuit-tracer (tests/evals/circuits/test_circuit_tracer.py says how). The same coders, model, prompt and
number of latents; theirs in a process of its own, loading not counted, in turn with ours.

What `evaluate.py run=RUNS` found is copied beside the times and, from each DIR that `circuit.py verify=N` wrote, its
scores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from skipcoder.evals.circuits.attribution import attribute
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.evals.circuits.page import write_page
from skipcoder.evals.circuits.trace import Tracer
from skipcoder.trainer.formats import circuit_tracer
from tests.conftest import REPO
from tests.evals.circuits.test_page import large

PROMPT = "The capital of the state containing Dallas is"
THEIRS = REPO / "tests" / "evals" / "circuits" / "in_circuit_tracer.py"


def ids_of(tracer: Tracer) -> torch.Tensor:
    """The prompt's tokens after a special one, without which circuit-tracer would put one there."""
    return torch.cat([torch.tensor([tracer.store.attrs["special_tokens"][1]]), tracer.ids(PROMPT)])


def write_case(tracer: Tracer, folder: Path) -> None:
    """What in_circuit_tracer.py reads."""
    tracer.model.save_pretrained(folder / "model")
    tracer.tokenizer.save_pretrained(folder / "model")
    # transformers 5 names a class that 4, which TransformerLens wants, lacks.
    (folder / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"})
    )
    circuit_tracer.write([run.coder for run in tracer.runs.values()], folder / "coders")
    (folder / "ids.json").write_text(json.dumps(ids_of(tracer).tolist()))


def theirs(python: str, folder: Path, latents: int) -> float:
    """Seconds of circuit-tracer's attribution."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, str(THEIRS), str(folder), str(latents)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.split("attribution took ")[1].split()[0])


def ours(tracer: Tracer, latents: int) -> dict[str, float]:
    """Seconds of ours, and the nodes."""
    ids = ids_of(tracer)
    begun = time.perf_counter()
    replacement = tracer.replacement(ids)
    linear = time.perf_counter()
    found = attribute(replacement, max_latents=latents)
    return {
        "linear_seconds": linear - begun,
        "edges_seconds": time.perf_counter() - linear,
        "tokens": len(ids),
        "active": len(found.latents),
        "visited": len(found.visited),
        "departure": found.departure(),
    }


def page_seconds(rounds: int) -> list[float]:
    """Seconds until the page of a large graph shows the edges of a node."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "index.html"
        write_page(file, large(), {}, {}, str)
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        seconds = []
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            begun = time.perf_counter()
            page.goto(file.as_uri())
            page.wait_for_selector(".edge", state="attached")
            seconds.append(time.perf_counter() - begun)
            page.close()
        browser.close()
    return seconds


def of_set(folder: Path) -> dict[str, Any]:
    """How the set was trained, and what an evaluation found of it."""
    rows, (together,) = (json.loads((folder / name).read_text()) for name in ("set.json", "set.together.json"))
    summaries = [json.loads((Path(row["run"]) / "summary.json").read_text()) for row in rows]
    found = {
        key: together[key] for key in ("ce_tokens", "ce_clean", "ce_spliced", "ce_zero", "ce_skip_only", "kl_spliced")
    }
    return {
        "coders": len(rows),
        **{key: summaries[0][key] for key in ("kind", "width", "k", "train_tokens")},
        "train_seconds": sum(one["seconds"] for one in summaries),
        "fvu_by_layer": together["fvu_by_hookpoint"],
        **found,
    }


def of_circuit(folder: Path) -> dict[str, Any]:
    """A circuit's scores."""
    circuit = json.loads((folder / "circuit.json").read_text())
    keys = ("prompt", "replacement", "completeness", "active", "visited", "departure", "verified")
    return {key: circuit[key] for key in keys} | {key: len(circuit[key]) for key in ("nodes", "edges")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--set", required=True)
    parser.add_argument("--circuit-tracer")
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--circuits", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    tracer = Tracer(CircuitConfig(asked.set, PROMPT, first_positions=1))
    result: dict[str, Any] = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(),
        "processor": next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                           if line.startswith("model name")), ""),
    }  # fmt: skip
    mine, peer = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "case"
        folder.mkdir()
        if asked.circuit_tracer:
            write_case(tracer, folder)
        ours(tracer, 64)  # what is loaded or compiled on first use
        for _ in range(asked.rounds):
            mine.append(ours(tracer, asked.latents))
            if asked.circuit_tracer:
                peer.append(theirs(asked.circuit_tracer, folder, asked.latents))
    result |= {key: statistics.median(one[key] for one in mine) for key in mine[0]}
    if peer:
        total = result["linear_seconds"] + result["edges_seconds"]
        result |= {"circuit_tracer_seconds": statistics.median(peer), "ratio": statistics.median(peer) / total}
    result["page_seconds"] = statistics.median(page_seconds(asked.rounds))
    if (Path(asked.set) / "set.json").exists():
        result["set"] = of_set(Path(asked.set))
    result["prompts"] = [of_circuit(folder) for folder in asked.circuits]
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
