"""The tables of docs/paper.md from what `make paper` evaluated.

python benchmarks/paper.py runs/paper/summary.seeds.json [runs/paper/spelling.seeds.json ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "fvu": "FVU",
    "fvu_per_dim": "FVU per dim",
    "dead_fraction": "dead",
    "ce_increase": "CE increase",
    "kl_spliced": "KL",
    "ce_recovered_zero": "recovered",
    "ce_skip_only": "CE skip only",
    "probing_k1": "probing k=1",
    "probing_k5": "probing k=5",
    "probing_gain_k5": "less a random coder",
    "tpp_20": "TPP 20",
    "scr_20": "SCR 20",
    "absorption_full": "absorption",
    "absorption_fraction": "absorbed",
    "split_latents": "split",
    "shared_latents": "shared",
}


def cell(row: dict[str, Any], key: str) -> str:
    """A mean, and half of its interval over seeds."""
    value, ends = row.get(key), row.get(f"{key}_ci")
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {(ends[1] - ends[0]) / 2:.3f}" if ends else "")


def main() -> None:
    """Print one table for each file."""
    for name in sys.argv[1:]:
        rows = json.loads(Path(name).read_text())
        columns = {key: title for key, title in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
        print(f"\n{rows[0]['hookpoint']}, width {rows[0]['width']:,}, {rows[0]['seeds']} seeds\n")
        print(f"| kind | k | {' | '.join(columns.values())} |")
        print("|" + "---|" * (len(columns) + 2))
        for row in sorted(rows, key=lambda row: (row["k"], row["kind"])):
            cells = " | ".join(cell(row, key) for key in columns)
            print(f"| {row['kind'].replace('_', ' ')} | {row['k']} | {cells} |")
        shared = [
            key for key in ("ce_clean", "ce_zero", "ce_mean", "probing_dense_x", "probing_dense_y") if key in rows[0]
        ]
        print("\n" + ", ".join(f"{key} {rows[0][key]:.3f}" for key in shared))


if __name__ == "__main__":
    main()
