"""Explain latents with a judge: `python evals/interpret.py run=DIR judge.base_url=URL judge.model=NAME latents=100`."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.cluster import deal
from skipcoder.evals.config import InterpretConfig, Scorer
from skipcoder.progress import progress
from skipcoder.settings import typed

MOST_COMPARED = 8
"""Most coders that a run's pages can be compared with."""

ConfigStore.instance().store(name="interpret_schema", node=InterpretConfig)


def interpret(cfg: InterpretConfig) -> None:
    """Explain and score latents of every chosen run, then write the pages."""
    from skipcoder.trainer.run.run import Run, find_runs

    paths = [Path(cfg.run)] if cfg.run else find_runs(cfg.runs or "")
    runs = [Run.open(path) for path in paths]
    for run in runs:
        if Scorer.intervention in cfg.scorers and cfg.judge.model is not None:
            run.refuse_several("scorers=[intervention]")
    if cfg.ray.is_set:
        deal(partial(_index, cfg), paths, cfg.ray.address, cfg.ray.tasks)
    asyncio.run(_interpret_all(cfg, runs))


def _index(cfg: InterpretConfig, paths: Sequence[Path]) -> None:
    """Find where the latents of some of the runs fire, in a task of their own; the rest is the judge's work."""
    from skipcoder.evals.latents.index import LatentIndex
    from skipcoder.trainer.data.joined import open_stores
    from skipcoder.trainer.run.device import pick_device
    from skipcoder.trainer.run.run import Run

    for run in map(Run.open, paths):
        LatentIndex(run, open_stores(*run.stores)).ensure(pick_device(cfg.device, "device"))


async def _interpret_all(cfg: InterpretConfig, runs: list[Any]) -> None:
    from skipcoder.evals.explain.interpreter import Interpreter
    from skipcoder.evals.explain.judge import Judge
    from skipcoder.evals.latents.index import LatentIndex
    from skipcoder.files import write_atomically
    from skipcoder.trainer.data.joined import open_stores
    from skipcoder.trainer.run.device import pick_device

    device = pick_device(cfg.device, "device")
    stores = {path: open_stores(*path) for path in dict.fromkeys(run.stores for run in runs)}
    models = Models(stores, device)
    cache = Path(cfg.judge.cache) if cfg.judge.cache else runs[0].path.parent / "judge.sqlite"
    rows, made = [], []
    async with Judge(cfg.judge, cache) as judge:
        for run in runs:
            store = stores[run.stores]
            index = LatentIndex(run, store)
            index.ensure(device)
            model = models[run.stores] if Scorer.intervention in cfg.scorers else None
            interpreter = Interpreter(index, store.load_tokenizer(), cfg, judge, model)
            made.append(interpreter)
            if cfg.judge.model is None:
                print(f"{run.path}: no judge.model is set, so nothing is explained")
                continue
            if not interpreter.chosen():
                print(f"{run.path}: none of its latents is in {cfg.circuit}")
                continue
            with progress("latents", len(interpreter.chosen()), "latents") as advance:
                summary = await interpreter.run(advance)
            _say(run.path, summary)
            rows.append({**run.summary, **summary, "run": str(run.path)})
    if cfg.out is not None:
        write_atomically(Path(cfg.out), json.dumps(rows, indent=2).encode())
        print(f"wrote {cfg.out}")
    if cfg.pages:
        _write_pages(made, models)


class Models(dict[str, Any]):
    """{store path: its language model}, each loaded on first use."""

    def __init__(self, stores: dict[str, Any], device: str) -> None:
        super().__init__()
        self.stores, self.device = stores, device

    def __missing__(self, path: str) -> Any:
        self[path] = self.stores[path].load_model(self.device)
        return self[path]


def _write_pages(interpreters: list[Any], models: "Models") -> None:
    from skipcoder.evals.features.pages import write_pages

    for one in interpreters:
        run = one.index.run
        others = [o.index.run for o in interpreters if o is not one][:MOST_COMPARED]
        with progress("pages", one.index.width, "latents") as advance:
            page = write_pages(one.index, one.maker, one.tokenizer, models[run.stores], others, advance)
        print(f"wrote {page}")


def _say(path: Path, summary: Mapping[str, Any]) -> None:
    use = summary["use"]
    print(
        f"{path}: {summary['explained']} of {summary['latents']} latents explained; {use['requests']} requests, "
        f"{use['cached']} answers from the cache, {use['failures']} failures, cost {use['cost']:.2f}"
    )
    for name in ("detection", "fuzzing", "embedding", "simulation", "intervention", "shuffled_explanations"):
        if name in summary:
            score = summary[name]
            keys = [key for key in ("balanced_accuracy", "f1", "auroc", "correlation") if key in score]
            facts = [f"{key} {_number(score[key], score[f'{key}_ci'])}" for key in keys]
            print(f"  {name.replace('_', ' ')}: {', '.join(facts)}")
    if use["failures"]:
        print(f"  problems: {', '.join(f'{count} x {what}' for what, count in summary['problems'].items())}")
    calibration = summary["calibration"]
    accuracy = _number(calibration["balanced_accuracy"], calibration["balanced_accuracy_ci"])
    print(f"  calibration, explanations known to be right: balanced_accuracy {accuracy}")
    if calibration["usable"] is None:
        print("  the text holds too few frequent words to plant latents: whether the judge can judge is not known")
    elif not calibration["usable"]:
        print(f"  WARNING: the judge {summary['judge']} is unusable: it fails on planted latents; scores say nothing")


def _number(value: float | None, ci: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="interpret")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    interpret(typed(cfg, InterpretConfig))


def cli_main() -> None:
    """Console script `skipcoder-interpret`."""
    sys.exit(cli.run(main, "interpret"))


if __name__ == "__main__":
    cli_main()
