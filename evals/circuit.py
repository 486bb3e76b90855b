"""From a prompt to its circuit: `python evals/circuit.py run=SET prompt='The capital of France is'`."""

import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.files import refuse_unwritable, write_atomically
from skipcoder.progress import progress
from skipcoder.settings import typed

if TYPE_CHECKING:
    from skipcoder.evals.circuits.graph import Circuit

ConfigStore.instance().store(name="circuit_schema", node=CircuitConfig)


def circuit(cfg: CircuitConfig) -> list[Path]:
    """Trace every prompt and write its graph and page; returns their folders."""
    from skipcoder.evals.circuits import contexts
    from skipcoder.evals.circuits.graph import circuit_tracer_form
    from skipcoder.evals.circuits.page import write_overview, write_page
    from skipcoder.evals.circuits.recurring import recurring
    from skipcoder.evals.circuits.trace import Tracer, prompts_of

    prompts = prompts_of(cfg)
    tracer = Tracer(cfg)
    default = f"{slug(cfg.prompt or Path(cfg.prompts or '').stem)}-{fingerprint(cfg)}"
    out = Path(cfg.out) if cfg.out else Path(cfg.run) / "circuits" / default
    out.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(out)
    ids = [tracer.ids(prompt) for prompt in prompts]  # UserError before anything is computed
    tracer.targets()
    folders = [out] if cfg.prompt is not None else [out / str(i) for i in range(len(prompts))]
    for stale in out.iterdir():  # of an earlier, longer file of prompts
        if stale.name.isdigit() and stale not in folders and (stale / "circuit.json").is_file():
            shutil.rmtree(stale)
    circuits = []
    with progress("tracing", len(prompts), "prompts") as advance:
        for prompt, one, folder in zip(prompts, ids, folders, strict=True):
            circuits.append(tracer.trace(prompt, tracer.replacement(one)))
            folder.mkdir(exist_ok=True)
            write_atomically(folder / "circuit.json", json.dumps(circuits[-1]).encode())
            advance(1)
    store_tokens = tracer.store.rows * tracer.store.context
    with progress("contexts", len(tracer.runs) * store_tokens * bool(cfg.contexts)) as advance:
        latents = contexts.shown_latents(tracer, circuits, cfg.contexts, advance)
    for found, folder in zip(circuits, folders, strict=True):
        vocabulary = {t: tracer.text(t) for node in found["nodes"] if (t := node["token"]) is not None}
        labels = {
            node["id"]: contexts.label(latents[f"{node['layer']}_{node['latent']}"], tracer.text)
            for node in found["nodes"]
            if node["kind"] == "latent"
        }
        form = circuit_tracer_form(found, slug(found["prompt"]), cfg.scan or tracer.name, vocabulary, labels)
        write_atomically(folder / "circuit_tracer.json", json.dumps(form).encode())
        write_page(folder / "index.html", found, latents, contexts.pages_of(tracer, folder), tracer.text)
        _say(folder / "index.html", found)
    if cfg.prompts is not None:
        shared = recurring(circuits)
        write_atomically(out / "recurring.json", json.dumps(shared, indent=1).encode())
        called = {f"latent {key.replace('_', '/')}": contexts.label(one, tracer.text) for key, one in latents.items()}
        nexts = {node["token"] for one in circuits for node in one["nodes"] if node["kind"] == "logit"}
        called |= {f"next {token}": repr(tracer.text(token or 0)) for token in nexts}
        write_overview(out / "index.html", shared, called)
        print(f"{out / 'index.html'}: what these {len(circuits)} circuits share")
    return folders


def _say(page: Path, found: "Circuit") -> None:
    print(
        f"{page}: {len(found['nodes']):,} nodes, {len(found['edges']):,} edges of {found['active']:,} active latents; "
        f"replacement score {found['replacement']:.2f}, completeness {found['completeness']:.2f}; "
        f"MLPs as they are at {len(found['left_out'])} of {len(found['ids'])} positions"
    )
    for where in ("real", "replacement") if "verified" in found else ():
        fit = found["verified"][where]
        if fit["correlation"] is None:
            print(f"  ablations in the {where} model: too few latents, or no change")
            continue
        low, high = fit["correlation_ci"]
        correlation = f"{fit['correlation']:.2f} [{low:.2f}, {high:.2f}]"
        print(f"  ablations in the {where} model: correlation with what the graph predicts {correlation}")


def fingerprint(cfg: CircuitConfig) -> str:
    """Six signs that differ between settings that give different graphs."""
    kept = replace(cfg, out=None, device=None, batch=1, contexts=0, verify=0, scan=None)
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:6]


def slug(text: str) -> str:
    """A folder's name made of a prompt."""
    return "-".join(re.findall(r"[A-Za-z0-9]+", text))[:60].rstrip("-").lower() or "prompt"


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="circuit")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    circuit(typed(cfg, CircuitConfig))


def cli_main() -> None:
    """Console script `skipcoder-circuit`."""
    sys.exit(cli.run(main, "circuit"))


if __name__ == "__main__":
    cli_main()
