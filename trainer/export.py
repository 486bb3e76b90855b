"""Write coders as another tool's files: `python trainer/export.py run=DIR format=sparsify out=PATH`."""

import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.settings import typed
from skipcoder.trainer.formats.config import ExportConfig

ConfigStore.instance().store(name="export_schema", node=ExportConfig)


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="export")
@cli.task
def main(cfg: DictConfig) -> None:
    """Entry point that Hydra calls."""
    config = typed(cfg, ExportConfig)
    from skipcoder.evals.export.export import export
    from skipcoder.trainer.run.run import find_runs

    export(config, [Path(config.run)] if config.run else find_runs(config.runs or ""))


def cli_main() -> None:
    """Console script `skipcoder-export`."""
    sys.exit(cli.run(main, "export"))


if __name__ == "__main__":
    cli_main()
