"""Type text, see which latents fire, edit them, and read what the model writes: `python evals/explore.py run=DIR`."""

import socket
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.errors import UserError
from skipcoder.evals.config import ExploreConfig
from skipcoder.settings import typed

ConfigStore.instance().store(name="explore_schema", node=ExploreConfig)


def explore(cfg: ExploreConfig) -> None:
    """Serve the explorer until it is interrupted."""
    try:
        import uvicorn

        from skipcoder.evals.explorer.server import app
    except ImportError as error:
        raise UserError(f"the explorer needs {error.name}: pip install 'skipcoder[explore]'") from error
    from skipcoder.evals.explorer.explorer import Explorer
    from skipcoder.trainer.data.joined import open_stores
    from skipcoder.trainer.run.device import pick_device
    from skipcoder.trainer.run.run import Run

    run = Run.open(Path(cfg.run))
    explorer = Explorer(run, open_stores(*run.stores), pick_device(cfg.device, "device"))
    config = uvicorn.Config(app(explorer), log_level="warning")
    try:
        listening = socket.create_server(("127.0.0.1", cfg.port))
    except OSError as error:
        raise UserError(f"port={cfg.port}: {error.strerror}; port=0 takes any that is free") from error
    port = listening.getsockname()[1]
    print(f"open http://127.0.0.1:{port} (this machine alone can); Ctrl-C ends it", flush=True)
    if not explorer.about()["pages"]:
        print(f"latents have names once they have pages: python evals/interpret.py run={cfg.run}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="explore")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    explore(typed(cfg, ExploreConfig))


def cli_main() -> None:
    """Console script `skipcoder-explore`."""
    sys.exit(cli.run(main, "explore"))


if __name__ == "__main__":
    cli_main()
