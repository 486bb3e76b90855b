"""Make a run from another tool's coder: `python trainer/import_coder.py source=PATH store.path=STORE run.dir=DIR`."""

import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.settings import typed
from skipcoder.trainer.formats.config import ImportConfig

ConfigStore.instance().store(name="import_schema", node=ImportConfig)


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="import")
@cli.task
def main(cfg: DictConfig) -> None:
    """Entry point that Hydra calls."""
    config = typed(cfg, ImportConfig)
    from skipcoder.trainer.formats.importing import import_coder

    summary = import_coder(config)
    print(f"{config.run.dir}: {summary['kind']} k={summary['k']} width={summary['width']}")


def cli_main() -> None:
    """Console script `skipcoder-import`."""
    sys.exit(cli.run(main, "import"))


if __name__ == "__main__":
    cli_main()
