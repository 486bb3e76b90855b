"""Write coders as another tool's files: first to a temporary folder, where they are read back and compared on held-out
activations, and only then to their place."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder import hub
from skipcoder.errors import UserError
from skipcoder.evals.export import card, circuit_tracer_features, neuronpedia
from skipcoder.evals.export.delphi import export as export_firings
from skipcoder.evals.features.pages import text_of
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.files import refuse_full
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.progress import progress
from skipcoder.trainer.coder import readers
from skipcoder.trainer.coder.activations.threshold import CALIBRATION_TOKENS
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.convert import converted
from skipcoder.trainer.coder.files import shareable
from skipcoder.trainer.config import ActivationName, Kind
from skipcoder.trainer.formats import circuit_tracer, plain, saelens, sparsify
from skipcoder.trainer.formats.config import ExportConfig, Target, TopK
from skipcoder.trainer.formats.fit import ROWS, Sample, fit
from skipcoder.trainer.formats.hooks import layer_of
from skipcoder.trainer.run.device import pick_device
from skipcoder.trainer.run.run import Run

_OF_LATENTS = (Target.delphi, Target.neuronpedia)
"""Formats that hold latents' activations instead of weights."""


@dataclass(frozen=True)
class Export:
    """One coder to export."""

    run: Run
    store: ActivationStore
    coder: SparseCoder
    changed: dict[str, Any]
    """What differs from the run's coder, for the metadata; {} if nothing does."""

    @cached_property
    def held_out(self) -> Sample:
        """Activations that the coder was not trained on."""
        return Sample.of(self.store, self.run.summary["hookpoint"], self.run.filter)

    def read_side(self, sample: Sample) -> Tensor:
        """[N, D]: the side of the sample that the coder reads."""
        return sample.side(self.run.read_site.side)

    def with_thresholds(self) -> "Export":
        """The same with thresholds in place of top-k; prints what that changes on held-out tokens."""
        sample = Sample.of(self.store, self.run.summary["hookpoint"], self.run.filter, "train", CALIBRATION_TOKENS)
        coder = converted(self.coder, self.read_side(sample))
        sides = self.run.read_site.side, self.run.write_site.side
        before, after = fit(self.coder, self.held_out, *sides), fit(coder, self.held_out, *sides)
        changed = {
            "skipcoder_conversion": "top-k to thresholds",
            **{
                f"{key}_{when}": found[key] for when, found in (("topk", before), ("threshold", after)) for key in found
            },
        }
        print(
            f"{self.run.path}: top-k became thresholds: L0 {before['l0']:.1f} -> {after['l0']:.1f}, "
            f"held-out FVU {before['fvu']:.4f} -> {after['fvu']:.4f}"
        )
        return replace(self, coder=coder, changed=changed)


def export(cfg: ExportConfig, paths: Sequence[Path]) -> Path:
    """Write, verify and, if asked, push the coders."""
    out = Path(cfg.out)
    refuse_full(out, "out")
    exports = [_open(path, cfg) for path in paths]
    names = [e.run.summary["hookpoint"] for e in exports]
    if len(set(names)) < len(names) and cfg.format is not Target.circuit_tracer:
        raise UserError(f"runs={cfg.runs} has several coders of one hookpoint ({', '.join(names)}); choose one of each")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        work = Path(beside) / "out"
        work.mkdir()
        if cfg.format in _OF_LATENTS:
            models: dict[str, Any] = {}
            for e in exports:
                index = LatentIndex(e.run, e.store)
                index.ensure(pick_device(None))
                if cfg.format is Target.delphi:
                    export_firings(index, work)
                else:
                    place = str(e.store.place)
                    models[place] = models.get(place) or e.store.load_model()
                    _to_neuronpedia(index, models[place], cfg, work)
        else:
            exports = _write_coders(exports, cfg, work)
            card.write(work, [e.run for e in exports], cfg.format.value, cfg.license, [e.changed for e in exports])
        work.replace(out)
    how = "" if cfg.format in _OF_LATENTS else f"; {out / 'README.md'} says how to read it"
    print(f"{out}: {cfg.format.value}, {len(exports)} coder{'s' * (len(exports) > 1)}{how}")
    if cfg.push is not None:
        try:
            print(f"pushed: {hub.upload(out, cfg.push, cfg.private)}")
        except UserError as error:
            raise UserError(f"{error}. The export is complete; upload it by: hf upload {cfg.push} {out}") from None
    return out


def _write_coders(exports: Sequence[Export], cfg: ExportConfig, folder: Path) -> list[Export]:
    """Write and verify coders; return what was written."""
    if cfg.format is Target.circuit_tracer:
        exports = [_suited_to_circuit_tracer(e, cfg.topk) for e in exports]
        circuit_tracer.write([e.coder for e in exports], folder)
        for e in exports:
            layer = layer_of(e.coder.meta["write"]["module"])
            _compare(e, readers.read(folder, "circuit_tracer", layer=layer))
        if cfg.features:
            _write_features(exports, folder / "features")
        return list(exports)
    return [_write_one(e, cfg, folder if cfg.run else folder / e.run.summary["hookpoint"]) for e in exports]


def _to_neuronpedia(index: LatentIndex, model: nn.Module, cfg: ExportConfig, folder: Path) -> None:
    tokenizer = index.store.load_tokenizer()
    with progress("latents", int((index.counts > 0).sum()), "latents") as advance:
        neuronpedia.export(index, model, tokenizer, cfg.neuronpedia, folder, advance)


def _write_features(exports: Sequence[Export], folder: Path) -> None:
    exports = sorted(exports, key=lambda e: layer_of(e.coder.meta["write"]["module"]))
    indices = [LatentIndex(e.run, e.store) for e in exports]
    for index in indices:
        index.ensure(pick_device(None))
    store = exports[0].store
    text = cache(partial(text_of, store.load_tokenizer()))
    with progress("latents", sum(index.width for index in indices), "latents") as advance:
        circuit_tracer_features.write(indices, store.load_model(), text, folder, advance)


def push_to_hub(run: str | Path, name: str, private: bool = False, license: str | None = None) -> str:
    """Put a run's coder with its model card on the Hugging Face Hub as ORG/NAME, where `SparseCoder.from_pretrained`
    finds it; returns the address of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        opened = Run.open(Path(run))
        opened.refuse_several("the model card")
        opened.coder.meta = shareable(opened.coder.meta)
        plain.write(opened.coder, Path(folder))
        card.write(Path(folder), [opened], "plain", license, [{}])
        return hub.upload(Path(folder), name, private)


def _open(path: Path, cfg: ExportConfig) -> Export:
    run = Run.open(path)
    run.refuse_several(f"format={cfg.format.value}")
    store = ActivationStore.open(cfg.store.path or run.store_path)
    run.check(store)
    run.coder.meta = shareable(run.coder.meta)
    return Export(run, store, run.coder, {})


def _write_one(e: Export, cfg: ExportConfig, folder: Path) -> Export:
    write: Callable[[SparseCoder, Path], None] = sparsify.write if cfg.format is Target.sparsify else plain.write
    if cfg.format is Target.saelens:
        if e.coder.cfg.activation == ActivationName.topk and e.coder.cfg.kind != Kind.sae:
            if cfg.topk is None:
                raise UserError(
                    f"{e.run.path}: SAELens has no top-k transcoder. topk=exact writes one for the classes of "
                    "skipcoder.trainer.formats.saelens_classes, which must be imported where it is loaded; "
                    "topk=thresholds writes one that loads anywhere and fires above a threshold instead"
                )
            e = e.with_thresholds() if cfg.topk is TopK.thresholds else e
        saelens.write(e.coder, folder, e.changed)
    else:
        write(e.coder, folder)
    _compare(e, readers.read(folder, cfg.format.value))
    return e


def _suited_to_circuit_tracer(e: Export, topk: TopK | None) -> Export:
    if e.coder.cfg.activation != ActivationName.topk or e.coder.cfg.kind == Kind.sae:
        return e
    if topk is TopK.thresholds:
        return e.with_thresholds()
    few = int((e.coder(e.read_side(e.held_out)).values.amin(-1) <= 0).sum())
    if few:
        raise UserError(
            f"{e.run.path}: on {few} of {e.held_out.tokens} held-out tokens fewer than k={e.coder.cfg.k} latents are "
            "positive; circuit-tracer's top-k would take negative ones there. topk=thresholds exports thresholds"
        )
    return e


@torch.no_grad()
def _compare(e: Export, again: nn.Module) -> None:
    """Check that the coder read back gives the same bits."""
    for x in e.read_side(e.held_out).split(ROWS):
        if not torch.equal(e.coder(x).y_hat, again(x).y_hat):
            raise RuntimeError(f"{e.run.path}: read back, it is not the run's coder; please report this")
