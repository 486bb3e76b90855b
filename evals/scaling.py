"""Fit how a coder's errors depend on k, width and training tokens, and predict other runs:
`python evals/scaling.py runs='DIR/*' predict='k=64 width=65536 tokens=1e9'`."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from skipcoder import cli
from skipcoder.errors import UserError
from skipcoder.evals.config import ScalingConfig
from skipcoder.settings import typed

ConfigStore.instance().store(name="scaling_schema", node=ScalingConfig)

_GIB = 2**30


def scaling(cfg: ScalingConfig) -> None:
    """Fit a law for each metric and each kind of coder; print it, and what it predicts."""
    # Imported here: torch and SciPy take seconds, and a wrong key should be refused at once.
    from skipcoder.evals.stats import law as laws
    from skipcoder.evals.tables import law_figure

    asked = _sizes(cfg.predict)
    groups = laws.groups(_rows(cfg.runs))
    others = laws.groups(_rows(cfg.against)) if cfg.against else {}
    if missing := [key for key in others if key not in groups]:
        raise UserError(f"against={cfg.against}: runs= has none that are {', '.join(missing[0])}")
    told: list[dict[str, Any]] = []
    drawn = []
    for key, rows in groups.items():
        named = dict(zip(laws.ALIKE, key, strict=True))
        print(f"{' '.join(key)}: {len(rows)} runs")
        for metric in ("fvu", "ce_increase"):
            try:
                law = laws.law_of(rows, metric)
            except laws.TooFewError as error:
                if metric == "fvu":
                    raise UserError(f"{' '.join(key)}: {error}") from None
                print(f"  {metric}: no law: {error}")
                continue
            print(f"  {metric}: {law.formula}")
            print(f"    {law.name}; {_off(law)}")
            if "ln T" not in law.formula:
                print("    all runs had the same number of tokens: what another number does is not known")
            found: list[dict[str, Any]] = []
            for row in others.get(key, []):
                found.append({"run": row["run"], **_predicted(law, laws.size_of(row)), "measured": row.get(metric)})
            found += [_predicted(law, laws.Size(**size)) for size in asked]
            if metric == "fvu" and (cfg.compute or cfg.memory_gib):
                found += list(_best(law, Path(rows[0]["run"]), cfg))
            for one in found:
                print(f"    {_line(one)}")
            told.append(named | {"metric": metric, "law": law.name, "formula": law.formula, "off": law.off,
                                 "runs": len(rows), "predictions": found})  # fmt: skip
            drawn.append((f"{named['kind'].replace('_', ' ')}, {named['hookpoint']}", metric, law, found))
    if cfg.out is not None:
        out = Path(cfg.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(told, indent=2) + "\n")
        law_figure.write(out.with_suffix(".svg"), drawn)
        print(f"wrote {out}, {out.with_suffix('.svg')}")


def _rows(pattern: str) -> list[Mapping[str, Any]]:
    """Rows as in a table of evaluate.py."""
    from skipcoder.evals.core import results
    from skipcoder.trainer.run.run import Run, find_runs

    rows: list[Mapping[str, Any]] = []
    for path in find_runs(pattern):
        run = Run.open(path)
        found = results.read(run)
        if "fvu" not in found:
            raise UserError(f"{path} has not been evaluated; run evals/evaluate.py runs={pattern!r} first")
        rows.append({**run.summary, **found, "run": str(path)})
    return rows


def _sizes(text: str | None) -> list[dict[str, float]]:
    """The runs to predict, from 'k=64 width=65536 tokens=1e9, ...'."""
    found = []
    for one in filter(None, map(str.strip, (text or "").split(","))):
        try:
            size = {name: float(value) for name, value in (part.split("=") for part in one.split())}
        except ValueError:
            size = {}
        if set(size) != {"k", "width", "tokens"} or min(size.values()) <= 0 or size["k"] > size["width"]:
            raise UserError(f"predict={one!r}: write predict='k=64 width=65536 tokens=1e9', k at most the width")
        found.append(size)
    return found


def _predicted(law: Any, size: Any) -> dict[str, Any]:
    found = law.predict(size)
    return {**size._asdict(), "value": found.value, "ci": [found.low, found.high], "beyond": found.beyond}


def _best(law: Any, example: Path, cfg: ScalingConfig) -> Iterator[dict[str, Any]]:
    """For each k of the runs the width (from 16, in steps of a fourth root of two) with the least error among those
    that the budget allows. More latents per token always do better, so k is not for the budget to choose."""
    from skipcoder.evals.stats.law import Size
    from skipcoder.trainer.bank.memory import MARGIN, need
    from skipcoder.trainer.config import TrainConfig
    from skipcoder.trainer.run.run import Run, RunDirectory

    coder = Run.open(example).coder
    config: Any = OmegaConf.merge(OmegaConf.structured(TrainConfig), RunDirectory(example).config())
    longest = max(size.tokens for size in law.sizes)
    for k in sorted({int(size.k) for size in law.sizes}):
        best: dict[str, Any] | None = None
        for step in range(4 * 4, 4 * 24 + 1):
            config.coder.k, config.coder.width = k, round(2 ** (step / 4))
            if k > config.coder.width:
                continue
            memory = sum(need(config, coder.d_in, coder.d_out, "cuda")) + MARGIN
            per_token = operations(config.coder.kind, k, config.coder.width, coder.d_in, coder.d_out)
            tokens = cfg.compute / per_token if cfg.compute else cfg.tokens or longest
            tokens = min(tokens, cfg.tokens or tokens)
            if (cfg.memory_gib and memory > cfg.memory_gib * _GIB) or tokens < config.train.batch_tokens:
                continue
            found = _predicted(law, Size(k, config.coder.width, tokens))
            if best is None or found["value"] < best["value"]:
                best = {**found, "operations": per_token * tokens, "memory_gib": memory / _GIB}
        if best is None:
            raise UserError(f"no coder of k={k} fits compute={cfg.compute} memory_gib={cfg.memory_gib}")
        yield best


def operations(kind: str, k: int, width: int, d_in: int, d_out: int) -> int:
    """Operations (two for each multiplication with addition) of one token in training: all pre-activations, and what
    k latents take to decode and to differentiate. Optimisers, whose time is the memory's, are not counted."""
    dense = 2 * width * d_in + (4 * d_in * d_out if kind == "skip_transcoder" else 0)
    return dense + 2 * k * (3 * d_out + d_in)


def _off(law: Any) -> str:
    own = f"off by {100 * law.off[law.name]:.1f} % on the widest and longest runs, fitted without them"
    rest = ", ".join(f"{name} {100 * off:.1f} %" for name, off in law.off.items() if name != law.name)
    return f"{own} ({rest})"


def _line(one: Mapping[str, Any]) -> str:
    low, high = one["ci"]
    text = f"k={one['k']:g} width={one['width']:,.0f} tokens={one['tokens']:,.0f}: {one['value']:.4f}"
    text += f" [{low:.4f}, {high:.4f}]"
    if "operations" in one:
        text += f" for {one['operations']:.2g} operations, {one['memory_gib']:.2g} GiB"
    if one.get("measured") is not None:
        text += f"; measured {one['measured']:.4f} ({100 * (one['value'] / one['measured'] - 1):+.1f} %)"
    if one["beyond"]:
        far = ", ".join(f"{name} {factor:.3g} times" for name, factor in one["beyond"].items())
        text += f"; EXTRAPOLATED beyond the runs: {far}"
    return text


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="scaling")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    scaling(typed(cfg, ScalingConfig))


def cli_main() -> None:
    """Console script `skipcoder-scaling`."""
    sys.exit(cli.run(main, "scaling"))


if __name__ == "__main__":
    cli_main()
