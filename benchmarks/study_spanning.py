"""Tables of docs/studies/spanning.md: coders over several layers beside coders of each layer by itself.

    python benchmarks/study_spanning.py FOLDER --json docs/studies/spanning.json

FOLDER holds cross/, saes/, clts/ and alone/, made by the commands of that page, each with the summary.json that
evaluation wrote.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

PAIRS = (("cross", "saes"), ("clts", "alone"))


def by_layer(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """{hookpoint: {key: the value of each seed}} of coders over several layers or of one each."""
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for side in row.get("sides") or [{"hookpoint": row["hookpoint"], **row}]:
            for key in ("fvu", "fvu_ci", "norm_share", "exclusive", "from_earlier"):
                if side.get(key) is not None:
                    found[side["hookpoint"]][key].append(side[key])
    return found


def shown(of_layer: dict[str, list[Any]]) -> str:
    """Mean FVU over seeds, its interval over documents, and the seeds' standard deviation."""
    low, high = (statistics.mean(ci[end] for ci in of_layer["fvu_ci"]) for end in (0, 1))
    return f"{statistics.mean(of_layer['fvu']):.4f} [{low:.4f}, {high:.4f}] ({statistics.stdev(of_layer['fvu']):.4f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kept: dict[str, Any] = {}
    for over, alone in PAIRS:
        rows = {name: json.loads((args.folder / name / "summary.json").read_text()) for name in (over, alone)}
        found = {name: by_layer(some) for name, some in rows.items()}
        kept |= found
        print(f"| layer | {over} | {alone} | extra |\n|---|---|---|---|")
        for layer, of_layer in found[over].items():
            extra = [
                f"{key} {statistics.mean(of_layer[key]):.3g}"
                for key in ("norm_share", "exclusive", "from_earlier")
                if key in of_layer
            ]
            print(f"| `{layer}` | {shown(of_layer)} | {shown(found[alone][layer])} | {', '.join(extra)} |")
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
