"""What it costs to replace top-k by thresholds: held-out FVU and L0 of a run's coder, with a threshold for each latent
(what `export topk=thresholds` writes), and with one for all.

    python benchmarks/thresholds.py runs/paper/train/12 runs/paper/train/21
"""

import argparse
from pathlib import Path

import torch

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.activations.threshold import CALIBRATION_TOKENS, set_threshold
from skipcoder.trainer.coder.convert import converted
from skipcoder.trainer.formats.fit import Sample, fit
from skipcoder.trainer.run.run import Run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    print(f"torch {torch.__version__}")
    for path in parser.parse_args().runs:
        run = Run.open(path)
        store, hookpoint = ActivationStore.open(run.store_path), run.summary["hookpoint"]
        sides = run.read_site.side, run.write_site.side
        held_out = Sample.of(store, hookpoint, run.filter)
        x = Sample.of(store, hookpoint, run.filter, "train", CALIBRATION_TOKENS).side(sides[0])
        each = converted(run.coder, x)
        print(f"{path}: {run.coder.cfg.kind} k={run.coder.cfg.k}, {held_out.tokens:,} held-out tokens")
        ways = {"top-k": fit(run.coder, held_out, *sides), "a threshold each": fit(each, held_out, *sides)}
        set_threshold(each, x, run.coder.cfg.k)
        ways["one for all"] = fit(each, held_out, *sides)
        for way, found in ways.items():
            print(f"  {way:18}FVU {found['fvu']:.4f}  L0 {found['l0']:.2f}")
