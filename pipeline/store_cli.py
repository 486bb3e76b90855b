"""Look into a store and make another of it.

python pipeline/store_cli.py info PATH
python pipeline/store_cli.py verify PATH                            re-reads everything
python pipeline/store_cli.py recode PATH NEW [--compression lz4]    in the newest format; run again to go on
"""

import argparse
import json
import sys
from contextlib import suppress

import numpy as np

from skipcoder import cli
from skipcoder.errors import UserError
from skipcoder.pipeline.config import Compression
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store import recode as recoding
from skipcoder.pipeline.store.attrs import compression_of, read_attrs, widths_of
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.verify import problems
from skipcoder.pipeline.text.overlap import NGRAM, shared
from skipcoder.pipeline.text.splits import TRAIN
from skipcoder.progress import progress


def info(place: Place) -> int:
    """Print what the store holds, its source, splits and size, and what the codec lost."""
    store = ActivationStore.open(place)
    identity, attrs = store.attrs["identity"], store.attrs
    units, done = layout.num_units(store.rows, store.unit_rows), len(store.units)
    shards = {name: facts["bytes"] for record in store.commits.values() for name, facts in record.shards.items()}
    stored = sum(r.rows[1] - r.rows[0] for r in store.commits.values()) * store.context
    lines = {
        "model": f"{attrs['model']['name']} ({attrs['model']['id']}, revision {attrs['model']['revision'] or 'none'})",
        "data": f"{attrs['data']['kind']} {attrs['data']['path'] or ''}".strip(),
        "tokens": f"{store.rows * store.context:,} in {store.rows:,} rows of {store.context}",
        "units": f"{done} of {units}, {store.unit_rows} rows each" + ("" if done == units else ": unfinished"),
        "codec": f"{identity['codec']}, {compression_of(attrs)}, format {attrs['version']}",
        "bytes": f"{sum(shards.values()):,}, {sum(shards.values()) / stored:,.0f} per token",
        "software": ", ".join(f"{name} {version}" for name, version in attrs["software"].items()),
        "identity": attrs["identity_hash"],
    }
    for name, value in (lines | _text(store)).items():
        print(f"{name:12}{value}")
    print(f"{'hookpoint':24}{'side':8}{'module':32}{'d':>7}{'bytes/token':>13}{'mean norm':>12}{'lost':>10}")
    for name, facts in store.hookpoints.items():
        for side, d in widths_of(facts).items():
            module = facts["read"] if side == "input" else facts["write"]
            size = sum(n for shard, n in shards.items() if shard.startswith((f"{name}/{side}/", f"{name}/{side}_")))
            all_units = store.moments(name, side, split=None)
            facts_of_side = f"{d:>7}{size / stored:>13.0f}{all_units.mean_norm:>12.3g}{all_units.lost:>10.1e}"
            print(f"{name:24}{side:8}{module:32}{facts_of_side}")
    return cli.DONE


def _text(store: ActivationStore) -> dict[str, str]:
    """Tokens and documents of each split, and how much of the held-out text stands in training. All of the text is read
    for it, so it is kept beside the store."""
    file = f"text-{store.content}.json"
    with suppress(OSError, ValueError):
        kept: dict[str, str] = json.loads(store.derived.read(file))
        return kept
    splits = layout.split(layout.num_units(store.rows, store.unit_rows), store.split_scheme)
    units = {name: [unit for unit in of if unit in store.commits] for name, of in splits.items()}
    found = {"splits": store.split_scheme or "by unit: documents cross from training to held-out text"}
    for name, of in units.items():
        documents = {int(document) for unit in of for document in np.unique(store.documents(unit))}
        found[name] = (
            f"{sum(stop - start for start, stop in map(store.unit_range, of)):,} tokens of {len(documents):,} documents"
        )
        both = None if name == TRAIN or not of else shared(map(store.tokens, of), map(store.tokens, units[TRAIN]))
        if both is not None:
            found[name] += f"; {both:.2%} of what is {NGRAM} tokens long stands in train, too"
    with suppress(OSError, UserError):  # not writable, as beside a shared store
        store.derived.write(file, json.dumps(found).encode())
    return found


def verify(place: Place) -> int:
    """Print every problem; return 1 if there is one."""
    found = 0
    for problem in problems(place):
        print(problem)
        found += 1
    print(f"{place}: {f'{found} problems' if found else 'all as captured'}")
    return cli.FAILED if found else cli.DONE


def recode(place: Place, new: Place, compression: Compression) -> int:
    """Write the store anew at another place, and say what to do with it."""
    store = ActivationStore.open(place)
    with new.only_writer() as alone, progress("recode", len(store.units), "units") as advance:
        if read_attrs(new) is not None and alone:  # UserError for what is no store
            new.sweep()
        for _ in recoding.recode(store, new, compression.value):
            advance(1)
    print(f"{new} holds what {place} holds; verify it, then move it to {place}, where runs go on with it")
    return cli.DONE


def cli_main() -> None:
    """Console script `skipcoder-store`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, task in (("info", info), ("verify", verify), ("recode", recode)):
        command = commands.add_parser(name, help=task.__doc__)
        command.add_argument("path", help="directory, or s3://bucket/name.zarr")
        if task is recode:
            command.add_argument("new", help="directory or address of the store to make")
            command.add_argument("--compression", choices=[c.value for c in Compression], default="zstd")
    args = parser.parse_args()
    outcome = cli.DONE

    def run() -> None:
        nonlocal outcome
        place = place_at(args.path)
        if args.command == "recode":
            outcome = recode(place, place_at(args.new), Compression(args.compression))
        else:
            outcome = {"info": info, "verify": verify}[args.command](place)

    sys.exit(cli.run(run) or outcome)


if __name__ == "__main__":
    cli_main()
