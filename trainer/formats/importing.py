"""Make a run directory from another tool's coder. Held-out FVU settles what its files do not say."""

from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from skipcoder import hub
from skipcoder.errors import UserError
from skipcoder.files import refuse_full
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder import readers
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.files import FOLDER
from skipcoder.trainer.config import ActivationName
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.formats.assemble import read_json
from skipcoder.trainer.formats.config import ImportConfig, Source
from skipcoder.trainer.formats.fit import Sample, fit
from skipcoder.trainer.run.build import store_path
from skipcoder.trainer.run.device import pick_device
from skipcoder.trainer.run.provenance import attachment
from skipcoder.trainer.run.run import RunDirectory, Summary
from skipcoder.trainer.step.sides import Sides


class Way(NamedTuple):
    """One way of reading the files, and how well it fits."""

    fvu: float
    l0: float
    coder: SparseCoder
    sides: Sides


def import_coder(cfg: ImportConfig) -> Summary:
    """Write the run directory; return its summary. Held-out FVU settles what the files do not say."""
    directory = Path(cfg.run.dir)
    refuse_full(directory, "run.dir")
    device = pick_device(cfg.device, "device")
    store = ActivationStore.open(store_path(cfg.store.path))
    hookpoint = store.hookpoint(cfg.hookpoint)
    kept = TokenFilter(cfg.first_positions, cfg.special_tokens)
    sample = Sample.of(store, hookpoint, kept)
    widths = tuple(sample.x_ND.shape[1:] + sample.y_NE.shape[1:])

    folder = hub.folder_of(cfg.source, cfg.revision, cfg.subfolder)
    format = cfg.format or readers.detect(folder)
    ways = []
    for options in _options(cfg, format, folder):
        coder = SparseCoder.from_pretrained(str(folder), format=format, **options)
        for sides in _sides(cfg, coder.cfg.kind):
            wanted = tuple(widths[side == "output"] for side in sides)
            if (coder.d_in, coder.d_out) != wanted:
                raise UserError(
                    f"{folder} leads from {coder.d_in} to {coder.d_out} dimensions, but {hookpoint} of {store.place} "
                    f"has {wanted[0]} and {wanted[1]}; is it of another model?"
                )
            found = fit(coder.to(device), sample, *sides)
            ways.append(Way(found["fvu"], found["l0"], coder.cpu(), sides))
            facts = ", ".join(f"{key}={value}" for key, value in {**options, "reads": sides.read}.items())
            print(f"{folder} ({format}, {facts}): validation FVU {found['fvu']:.4f}, L0 {found['l0']:.1f}")
    fvu, l0, coder, sides = min(ways, key=lambda way: way.fvu)
    if fvu >= 1:
        print(f"this is no better than the mean: is {folder} a coder of {hookpoint} of this model?")
    if coder.cfg.activation == ActivationName.jumprelu:  # its files do not say how many latents should fire
        coder.cfg.k = min(max(round(l0), 1), coder.cfg.width)
    coder.meta = {**coder.meta, **attachment(store, hookpoint, sides, kept)}
    coder.meta["data"]["train_tokens"] = None
    coder.save(directory / FOLDER)
    summary: Summary = {
        "kind": coder.cfg.kind, "k": coder.cfg.k, "width": coder.cfg.width,
        "activation": coder.cfg.activation, "side": sides.write, "hookpoint": hookpoint,
        "model": store.attrs["model"]["name"], "seed": None, "train_tokens": None, "validation_fvu": fvu,
        "l0": l0, "seconds": None,
    }  # fmt: skip
    config = OmegaConf.structured(cfg)
    config.store.path = str(store.place)
    files = RunDirectory(directory)
    files.write_config(config)
    files.write_summary(summary)
    return summary


def _options(cfg: ImportConfig, format: str, folder: Path) -> list[dict[str, Any]]:
    """Return the options to try with the format's `read`: as configured, else all choices."""
    if cfg.layer is not None or format == Source.circuit_tracer:
        if cfg.layer is None or format != Source.circuit_tracer:
            raise UserError(f"layer=N is for format=circuit_tracer, which needs it; {folder} is {format}")
        return [{"layer": cfg.layer}]
    both: dict[str, str] = {Source.sparsify: "subtract_decoder_bias", Source.gemma_scope: "transcoder"}
    for name in both.values():
        if getattr(cfg, name) is not None and both.get(format) != name:
            raise UserError(f"{name} is not for format={format}, which {folder} is")
    if format not in both or (format == Source.gemma_scope and (folder / "config.json").exists()):
        return [{}]
    name = both[format]
    if format == Source.sparsify and not read_json(folder / "cfg.json").get("transcode"):
        return [{name: getattr(cfg, name)}]
    return [{name: value} for value in ((False, True) if getattr(cfg, name) is None else (getattr(cfg, name),))]


def _sides(cfg: ImportConfig, kind: str) -> list[Sides]:
    if kind != "sae":
        return [Sides("input", "output")]
    sides = [cfg.side.value] if cfg.side else ["output", "input"]
    return [Sides(side, side) for side in sides]
