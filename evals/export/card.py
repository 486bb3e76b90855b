"""README.md of exported coders, a model card for the Hugging Face Hub: what was trained on what, and how good it is."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from huggingface_hub import ModelCardData

from skipcoder.evals.core.results import read as read_evaluation
from skipcoder.evals.tables.law_figure import STYLE
from skipcoder.evals.tables.metrics import METRICS, Row, interval_of
from skipcoder.trainer.run.run import METRICS as METRICS_FILE
from skipcoder.trainer.run.run import Run, RunDirectory

USAGE = {
    "plain": """from skipcoder import SparseCoder

coder = SparseCoder.from_pretrained("ORG/NAME")  # or a folder
y_hat, values, indices = coder(x)  # x: [..., {d_in}]""",
    "sparsify": """from sparsify import SparseCoder

coder = SparseCoder.load_from_disk("FOLDER")""",
    "saelens": """from sae_lens import SAE

sae = SAE.load_from_disk("FOLDER")""",
    "saelens_classes": """import skipcoder.trainer.formats.saelens_classes  # registers the class
from sae_lens import SAE

sae = SAE.load_from_disk("FOLDER")""",
    "circuit_tracer": """from circuit_tracer import ReplacementModel

model = ReplacementModel.from_pretrained("MODEL", "ORG/NAME")  # of a folder: see config.yaml""",
}


def write(
    folder: Path, runs: Sequence[Run], format: str, license: str | None, changed: Sequence[dict[str, Any]]
) -> Path:
    """Write FOLDER/README.md and plots for coders in the folder. `changed`: what conversion did to each run."""
    first = runs[0]
    template = Path(__file__).with_name("card.md.j2").read_text()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    model = first.coder.meta["model"]["id"]
    data = ModelCardData(
        license=license,
        library_name="skipcoder" if format == "plain" else None,
        base_model=model if model.count("/") == 1 and not model.startswith(("/", ".")) else None,
        tags=["sparse-coder", "interpretability", first.coder.cfg.kind],
    )
    kinds = " and ".join(sorted({_kind(run) for run in runs}))
    usage = "saelens_classes" if format == "saelens" and not any(changed) and _needs_classes(first) else format
    kept = first.filter
    first_ones = "the first" if kept.first_positions == 1 else f"the first {kept.first_positions}"
    excluded = [f"{first_ones} of each row"] if kept.first_positions else []
    excluded += ["special tokens"] * kept.special_tokens
    excluded += [f"what {', '.join(kept.roles)} did not write"] if kept.roles else []
    excluded += [f"tokens longer than {kept.max_norm:g} medians"] if kept.max_norm else []
    page = environment.from_string(template).render(
        data=data.to_yaml(),
        title=f"{kinds} of {first.summary['model']}",
        lead=f"Exported by skipcoder {version('skipcoder')} in the files of {format}. License of the weights: "
        f"{license or 'not stated'}.",
        runs=[_describe(run, changes, folder) for run, changes in zip(runs, changed, strict=True)],
        usage=USAGE[usage].replace("{d_in}", str(first.coder.d_in)),
        excluded=", ".join(excluded) or "none",
    )
    (folder / "README.md").write_text(page)
    return folder / "README.md"


def _kind(run: Run) -> str:
    kind = run.coder.cfg.kind.replace("_", " ")
    return "SAE" if kind == "sae" else kind.capitalize()


def _needs_classes(run: Run) -> bool:
    return run.coder.cfg.activation == "topk" and run.coder.cfg.kind != "sae"


def _describe(run: Run, changed: dict[str, Any], folder: Path) -> dict[str, Any]:
    cfg, meta, summary = run.coder.cfg, run.coder.meta, run.summary
    source = meta["data"]["source"]
    steps = summary.get("steps")
    facts = {
        "kind": f"{_kind(run)}, {cfg.activation}, k = {cfg.k}",
        "latents": f"{cfg.width:,}",
        "reads": f"{meta['read']['side']} of `{meta['read']['module']}` ({run.coder.d_in})",
        "writes": f"{meta['write']['side']} of `{meta['write']['module']}` ({run.coder.d_out})",
        "model": f"{meta['model']['id']}, {meta['model'].get('revision') or 'no revision'}, {meta['model']['dtype']}",
        "text": f"{source['kind']} {source['path'] or ''}, rows of {source['context']} tokens",
        "training": f"{summary['train_tokens']:,} tokens, {steps:,} steps, seed {summary['seed']}" if steps else
        f"elsewhere (imported from {meta['imported']['format']})" if "imported" in meta else "not recorded",
        **_recipe(run),
    }  # fmt: skip
    found: Row = dict(read_evaluation(run))
    return {
        "hookpoint": summary["hookpoint"],
        "facts": facts,
        "tokens": f"{found.get('n', 0):,}",
        "metrics": {
            m.title: _number(found, m.key) for m in METRICS.values() if m.card and found.get(m.key) is not None
        },
        "changed": {
            title: (f"{changed[f'{key}_topk']:.4g}", f"{changed[f'{key}_threshold']:.4g}")
            for key, title in (("l0", "L0"), ("fvu", "FVU"))
            if f"{key}_topk" in changed
        },
        "plot": _plot(run, found, folder),
    }


def _recipe(run: Run) -> dict[str, str]:
    config = RunDirectory(run.path).config()
    if "optim" not in config:
        return {}
    rate = "the paper's rate" if config.optim.lr is None else f"rate {config.optim.lr:g}"
    return {"optimiser": f"{config.optim.name}, {rate}, batches of {config.train.batch_tokens:,} tokens"}


def _number(found: Row, key: str) -> str:
    ends = interval_of(found, key)
    return f"{found[key]:.4g}" + (f" [{ends[0]:.4g}, {ends[1]:.4g}]" if ends else "")


def _plot(run: Run, found: Row, folder: Path) -> str | None:
    """Draw training and densities; the file's name."""
    lines = RunDirectory(run.path).metrics if (run.path / METRICS_FILE).exists() else []
    histogram: dict[str, Any] = found.get("density_histogram") or {}
    panels = ["curve"] * bool(lines) + ["densities"] * bool(histogram)
    if not panels:
        return None
    name = f"{run.summary['hookpoint']}.png"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), layout="constrained", squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            if panel == "curve":
                axis.plot([line["tokens"] / 1e3 for line in lines], [line["fvu"] for line in lines])
                axis.set(xlabel="thousand tokens", ylabel="FVU", yscale="log")
            else:
                axis.stairs(histogram["latents"], histogram["log10_edges"])
                axis.set(xlabel="log10 share of tokens", ylabel="latents")
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
    return name
