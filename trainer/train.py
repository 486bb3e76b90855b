"""Train sparse coders on a store: `python trainer/train.py coder=skip_transcoder coder.k=32`; -m for sweeps."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.settings import typed
from skipcoder.trainer.config import TrainConfig

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="train")
@cli.task
def main(cfg: DictConfig) -> None:
    """Entry point that Hydra calls once per job. Jobs of a sweep write where Hydra says, a single run to run.dir."""
    config = typed(cfg, TrainConfig)
    from skipcoder.trainer.bank.bank import Job, train
    from skipcoder.trainer.bank.plan import Settings
    from skipcoder.trainer.bank.sweep import report, run_sweep, spread

    one = Job(config, Path(HydraConfig.get().runtime.output_dir))
    jobs = spread(one)
    if jobs == [one]:
        summaries = [train(*one)]
    else:
        outcomes = run_sweep(jobs, Settings())
        report(outcomes)
        summaries = [outcome.summary for outcome in outcomes if outcome.summary is not None]
    if int(os.environ.get("RANK", "0")):  # of torchrun's processes the first reports
        return
    for (_, directory), summary in zip(jobs, summaries, strict=True):
        print(f"{directory}: {summary['kind']} k={summary['k']} training FVU {summary['train_fvu']:.4f}")


def cli_main() -> None:
    """Console script `skipcoder-train`."""
    sys.exit(cli.run(main, "train"))


if __name__ == "__main__":
    cli_main()
