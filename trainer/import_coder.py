"""Make a run of another tool's coder: `python trainer/import_coder.py source=PATH store.path=STORE run.dir=DIR`."""

import json
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from skipcoder.pipeline import cli
from skipcoder.pipeline.errors import UserError
from skipcoder.trainer.formats.config import ImportConfig, Source

ConfigStore.instance().store(name="import_schema", node=ImportConfig)


def import_coder(cfg: ImportConfig) -> dict[str, Any]:
    """Write the run directory; returns its summary. What the files do not say is settled by held-out FVU."""
    from skipcoder.pipeline.place import write_atomically
    from skipcoder.pipeline.store import ActivationStore
    from skipcoder.trainer import formats, hub
    from skipcoder.trainer.assemble import attachment, pick_device, store_path
    from skipcoder.trainer.checkpoint import save_coder
    from skipcoder.trainer.config import Activation
    from skipcoder.trainer.formats.fit import Sample, fit
    from skipcoder.trainer.stream import TokenFilter

    directory = Path(cfg.run.dir)
    cli.refuse_full(directory, "run.dir")
    device = pick_device(cfg.device, "device")
    store = ActivationStore.open(store_path(cfg.store.path))
    hookpoint = store.hookpoint(cfg.hookpoint)
    kept = TokenFilter(cfg.first_positions, cfg.special_tokens)
    sample = Sample.of(store, hookpoint, kept)
    widths = tuple(sample.x_ND.shape[1:] + sample.y_NE.shape[1:])

    folder = hub.folder_of(cfg.source, cfg.revision, cfg.subfolder)
    format = cfg.format or formats.detect(folder)
    ways = []
    for options in _options(cfg, format, folder):
        coder = formats.read(folder, format, **options)
        for sides in _sides(cfg, coder.cfg.kind):
            wanted = tuple(widths[side == "output"] for side in sides)
            if (coder.d_in, coder.d_out) != wanted:
                raise UserError(
                    f"{folder} leads from {coder.d_in} to {coder.d_out} dimensions, but {hookpoint} of {store.place} "
                    f"has {wanted[0]} and {wanted[1]}; is it of another model?"
                )
            found = fit(coder.to(device), sample, *sides)
            ways.append((found, coder.cpu(), sides))
            facts = ", ".join(f"{key}={value}" for key, value in {**options, "reads": sides[0]}.items())
            print(f"{folder} ({format}, {facts}): held-out FVU {found['fvu']:.4f}, L0 {found['l0']:.1f}")
    found, coder, sides = min(ways, key=lambda way: way[0]["fvu"])
    if found["fvu"] >= 1:
        print(f"this is no better than the mean: is {folder} a coder of {hookpoint} of this model?")
    if coder.cfg.activation == Activation.jumprelu:  # its files do not say how many latents it is meant to have
        coder.cfg.k = min(max(round(found["l0"]), 1), coder.cfg.width)
    coder.meta = attachment(store, hookpoint, sides, kept) | coder.meta
    coder.meta["data"]["train_tokens"] = None
    save_coder(coder, directory / "checkpoint")
    summary = {
        "kind": coder.cfg.kind, "k": coder.cfg.k, "width": coder.cfg.width,
        "activation": coder.cfg.activation, "side": sides[1], "hookpoint": hookpoint,
        "model": store.attrs["model"]["name"], "seed": None, "train_tokens": None, "held_out_fvu": found["fvu"],
        "l0": found["l0"], "seconds": None,
    }  # fmt: skip
    config = OmegaConf.structured(cfg)
    config.store.path = str(store.place)
    write_atomically(directory / "config.yaml", OmegaConf.to_yaml(config).encode())
    write_atomically(directory / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _options(cfg: ImportConfig, format: str, folder: Path) -> list[dict[str, Any]]:
    """What the format's `read` may be told: as asked, else every way."""
    if cfg.layer is not None or format == Source.circuit_tracer:
        if cfg.layer is None or format != Source.circuit_tracer:
            raise UserError(f"layer=N is for format=circuit_tracer, which needs it; {folder} is {format}")
        return [{"layer": cfg.layer}]
    from skipcoder.trainer.formats.assemble import read_json

    both: dict[str, str] = {Source.sparsify: "subtract_decoder_bias", Source.gemma_scope: "transcoder"}
    for name in both.values():
        if getattr(cfg, name) is not None and both.get(format) != name:
            raise UserError(f"{name} is not for format={format}, which {folder} is")
    if format not in both:
        return [{}]
    name = both[format]
    if format == Source.sparsify and not read_json(folder / "cfg.json").get("transcode"):
        return [{name: getattr(cfg, name)}]
    return [{name: value} for value in ((False, True) if getattr(cfg, name) is None else (getattr(cfg, name),))]


def _sides(cfg: ImportConfig, kind: str) -> list[tuple[str, str]]:
    if kind != "sae":
        return [("input", "output")]
    sides = [cfg.side.value] if cfg.side else ["output", "input"]
    return [(side, side) for side in sides]


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="import")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    config = cli.typed(cfg, ImportConfig)
    summary = import_coder(config)
    print(f"{config.run.dir}: {summary['kind']} k={summary['k']} width={summary['width']}")


def cli_main() -> None:
    """Console script `skipcoder-import`."""
    sys.exit(cli.run(main))


if __name__ == "__main__":
    cli_main()
