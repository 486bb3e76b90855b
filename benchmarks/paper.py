"""The tables of docs/paper.md from what `make paper` evaluated.

python benchmarks/paper.py runs/paper/summary.json runs/paper/spelling.json docs/paper.json   # reduce, write, print
python benchmarks/paper.py docs/paper.json                                                    # print again
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import scipy.stats

from skipcoder.evals.tables.metrics import METRICS

COLUMNS = (
    "fvu", "fvu_per_dim", "dead_fraction", "ce_increase", "kl_spliced", "ce_skip_only", "probing_k1", "probing_k5",
    "probing_gain_k5", "contextfree_triple", "absorption_full", "absorption_fraction", "split_latents",
    "shared_latents",
)  # fmt: skip
FACTS = (
    "hookpoint", "width", "seeds", "train_tokens", "n", "documents", "ce_tokens", "ce_documents", "ce_clean", "ce_zero",
    "ce_mean", "probing_dense_x", "probing_dense_y",
)  # fmt: skip
CLAIMS = (
    ("A skip transcoder reconstructs better than a transcoder", "fvu", "skip_transcoder", "transcoder", -1),
    ("and costs less cross-entropy", "ce_increase", "skip_transcoder", "transcoder", -1),
    ("and less KL", "kl_spliced", "skip_transcoder", "transcoder", -1),
    ("A skip transcoder reconstructs better than an SAE", "fvu", "skip_transcoder", "sae", -1),
    ("and costs less cross-entropy", "ce_increase", "skip_transcoder", "sae", -1),
    ("and less KL", "kl_spliced", "skip_transcoder", "sae", -1),
    ("A transcoder reconstructs as well as an SAE", "fvu", "transcoder", "sae", 0),
    ("and costs as little cross-entropy", "ce_increase", "transcoder", "sae", 0),
    ("A skip transcoder is probed better than an SAE, five latents", "probing_k5", "skip_transcoder", "sae", 1),
    ("also after subtracting what its random twin gives", "probing_gain_k5", "skip_transcoder", "sae", 1),
    ("A skip transcoder is probed as well as a transcoder", "probing_k5", "skip_transcoder", "transcoder", 0),
    ("A skip transcoder absorbs less than an SAE", "absorption_fraction", "skip_transcoder", "sae", -1),
    ("A transcoder absorbs less than an SAE", "absorption_fraction", "transcoder", "sae", -1),
)
"""What is claimed, of which metric, of which kind against which, and the sign of their difference (0: none)."""


def reduced(names: list[str]) -> dict[str, Any]:
    """What the tables need of these evaluations."""
    tables, claims = [], []
    for name in names:
        rows = json.loads(Path(name).read_text())
        seeds = json.loads(Path(name).with_suffix(".seeds.json").read_text())
        kept = [
            {
                key: row[key]
                for key in ("kind", "side", "k", *(f"{c}{end}" for c in COLUMNS for end in ("", "_ci")))
                if row.get(key) is not None
            }
            for row in sorted(seeds, key=lambda row: (row["k"], row["kind"], row.get("side") or ""))
        ]
        tables.append({"facts": {key: rows[0].get(key, seeds[0].get(key)) for key in FACTS}, "rows": kept})
        claims += [claim(rows, *facts) for facts in CLAIMS if facts[1] in rows[0]]
    comparisons = sum(len(one["differences"]) for one in claims)
    for one in claims:
        for difference in one["differences"]:
            bounded(difference, comparisons)
        one["verdict"] = verdict(one)
    return {"tables": tables, "comparisons": comparisons, "claims": claims}


def claim(rows: list[dict[str, Any]], text: str, metric: str, kind: str, than: str, sign: int) -> dict[str, Any]:
    """The differences of two kinds, seed by seed, at each k. SAEs are those of the MLP's output."""
    found = {
        (row["kind"], row["k"], row["seed"]): row[metric]
        for row in rows
        if row.get(metric) is not None and row.get("side") != "input"
    }
    differences = []
    for k in sorted({k for _, k, _ in found if (kind, k, 0) in found}):
        seeds = sorted(seed for other, at, seed in found if (other, at) == (kind, k))
        differences.append({"k": k, "by_seed": [found[kind, k, seed] - found[than, k, seed] for seed in seeds]})
    return {"claim": text, "metric": metric, "kind": kind, "than": than, "sign": sign, "differences": differences}


def bounded(difference: dict[str, Any], comparisons: int) -> None:
    """Add mean and half of an interval that holds for all comparisons together (Student's t, Bonferroni)."""
    values = difference["by_seed"]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    difference["mean"] = mean
    difference["half"] = float(scipy.stats.t.ppf(1 - 0.025 / comparisons, len(values) - 1)) * deviation


def verdict(one: dict[str, Any]) -> str:
    """holds, does not hold, or cannot be told, at each k."""

    def at(difference: dict[str, Any]) -> str:
        mean, half = difference["mean"], difference["half"]
        if abs(mean) <= half:
            return "cannot be told"
        return "holds" if mean * one["sign"] > 0 else "does not hold"

    said = {difference["k"]: at(difference) for difference in one["differences"]}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"k {k}: {what}" for k, what in said.items())


def cell(row: dict[str, Any], key: str) -> str:
    """A mean, and half of its interval over seeds."""
    value, ends = row.get(key), row.get(f"{key}_ci")
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {(ends[1] - ends[0]) / 2:.3f}" if ends else "")


def show(found: dict[str, Any]) -> None:
    """Print the tables as Markdown."""
    for table in found["tables"]:
        facts = table["facts"]
        print(f"\n{', '.join(f'{key} {value}' for key, value in facts.items() if value is not None)}\n")
        columns = [key for key in COLUMNS if any(key in row for row in table["rows"])]
        print(f"| kind | k | {' | '.join(METRICS[key].short for key in columns)} |")
        print("|" + "---|" * (len(columns) + 2))
        for row in table["rows"]:
            kind = row["kind"].replace("_", " ") + (" of the input" if row.get("side") == "input" else "")
            print(f"| {kind} | {row['k'] or '-'} | {' | '.join(cell(row, key) for key in columns)} |")
    for ks in ([16, 32, 64], [32]):
        some = [one for one in found["claims"] if [d["k"] for d in one["differences"]] == ks]
        print(f"\n| claim | metric | {' | '.join(f'k {k}' for k in ks)} | |")
        print("|" + "---|" * (len(ks) + 3))
        for one in some:
            cells = " | ".join(f"{d['mean']:+.4f} ± {d['half']:.4f}" for d in one["differences"])
            print(f"| {one['claim']} | {METRICS[one['metric']].short} | {cells} | {one['verdict']} |")


def main() -> None:
    """Reduce evaluations to a file and print it, or print such a file."""
    *names, last = sys.argv[1:]
    if names:
        Path(last).write_text(json.dumps(reduced(names), indent=1) + "\n")
    show(json.loads(Path(last).read_text()))


if __name__ == "__main__":
    main()
