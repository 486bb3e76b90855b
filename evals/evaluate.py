"""Evaluate trained coders: `python evals/evaluate.py run=DIR`, or `runs='GLOB' out=FILE` for a sweep."""

import glob
import json
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from skipcoder.evals.config import EvaluateConfig
from skipcoder.pipeline import cli
from skipcoder.pipeline.errors import UserError

ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def evaluate(cfg: EvaluateConfig) -> None:
    """Evaluate every chosen run; with `out`, write the table and the report."""
    from skipcoder.evals import report
    from skipcoder.evals.run import Evaluator, Run, write_result
    from skipcoder.pipeline.store import ActivationStore
    from skipcoder.trainer.assemble import pick_device

    paths = [Path(cfg.run)] if cfg.run else find_runs(cfg.runs or "")
    runs = [Run.open(path) for path in paths]
    device = pick_device(cfg.device, "device")
    evaluators: dict[str, Evaluator] = {}
    rows: dict[Path, dict[str, Any]] = {}
    for path in dict.fromkeys(run.store_path for run in runs):
        evaluators[path] = Evaluator(ActivationStore.open(path), cfg.ce_tokens, cfg.batch_rows, device)
    for run in runs:
        evaluators[run.store_path].check(run)
    for path, evaluator in evaluators.items():
        for run, result in evaluator.evaluate([run for run in runs if run.store_path == path]):
            write_result(run, result)
            rows[run.path] = {**run.summary, **result, "run": str(run.path)}
            print(_line(rows[run.path]), flush=True)
    table = [rows[run.path] for run in runs]
    if cfg.out is not None:
        out = Path(cfg.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(table, indent=2) + "\n")
        stores = {path: evaluator.store for path, evaluator in evaluators.items()}
        page = report.write(table, stores, out.with_name("report.html"))
        _write_parquet(table, out.with_suffix(".parquet"))
        print(f"wrote {out}, {out.with_suffix('.parquet')} and {page}")


def _write_parquet(table: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict.fromkeys(key for row in table for key in row)  # not all kinds have all
    pq.write_table(pa.table({key: [row.get(key) for row in table] for key in columns}), path)


def find_runs(pattern: str) -> list[Path]:
    """Run directories that the glob matches, in natural order; UserError where there is none."""
    from natsort import natsorted

    found = [Path(p) for p in natsorted(glob.glob(pattern)) if (Path(p) / "config.yaml").is_file()]
    if not found:
        raise UserError(f"runs={pattern!r} matches no run directory (one that holds config.yaml)")
    return found


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['run']}: {row['kind']} k={row['k']}  FVU {row['fvu']:.4f}  dead {row['dead_fraction']:.3f}  "
        f"CE {row['ce_clean']:.3f} -> {row['ce_spliced']:.3f}  "
        f"recovered {_share(row['ce_recovered_zero'])} (zero) {_share(row['ce_recovered_mean'])} (mean)"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="evaluate")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    config = cli.typed(cfg, EvaluateConfig)
    evaluate(config)


def cli_main() -> None:
    """Console script `skipcoder-evaluate`."""
    sys.exit(cli.run(main))


if __name__ == "__main__":
    cli_main()
