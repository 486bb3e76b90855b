"""Capture a model's MLP inputs and outputs into a store: `python pipeline/cache.py model=gemma-2-2b`.

Neither torch nor Ray is imported until it is known that there is work to do.
"""

import sys
from dataclasses import asdict, replace
from enum import Enum
from importlib.metadata import version
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.errors import UserError
from skipcoder.pipeline.capture.neighbour import neighbour_with
from skipcoder.pipeline.config import CacheConfig, Compression, DeviceMap
from skipcoder.pipeline.model import load
from skipcoder.pipeline.store import commit, layout, writer
from skipcoder.pipeline.store.attrs import (
    Attributes,
    Described,
    HookpointFacts,
    Identity,
    compression_of,
    new_attrs,
    read_attrs,
    refuse_other_identity,
    widths_of,
)
from skipcoder.pipeline.store.codecs import CODECS, REVISION
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.places import beside, place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text import sources
from skipcoder.pipeline.text.chat import set_template
from skipcoder.pipeline.text.rows import beginning, bos_of, rows_of
from skipcoder.pipeline.text.splits import BY_DOCUMENT
from skipcoder.settings import typed

ConfigStore.instance().store(name="cache_schema", node=CacheConfig)


def capture(cfg: CacheConfig) -> None:
    """Create, extend or finish the store; if it is complete, say so and return. With plan=true, only show the cost."""
    sources.check(cfg.data)
    CODECS[cfg.store.codec]  # UserError for an unknown codec
    if cfg.plan:
        from skipcoder.pipeline import plan

        return plan.show(cfg)
    place = place_at(cfg.store.path)
    with place.only_writer() as alone:
        _capture(cfg, place, alone)


def _capture(cfg: CacheConfig, place: Place, alone: bool) -> None:
    attrs = read_attrs(place)
    rows = -(-cfg.data.tokens // cfg.data.context)
    _choose(cfg, attrs)
    identity = _identity(cfg, attrs)
    if not identity["unit_rows"]:  # that of a store with the same text: then the two are aligned
        near = neighbour_with(place, identity, rows, None)
        identity["unit_rows"] = near.unit_rows if near else layout.auto_unit_rows(rows, cfg.data.context)
    unit_rows = identity["unit_rows"]
    if attrs is not None:
        if "found_writing" in attrs["identity"]:
            identity["found_writing"] = attrs["identity"]["found_writing"]
        if "compression" in attrs["identity"] and attrs["rows"]:
            identity["compression"] = attrs["identity"]["compression"]
    # A capture killed before its tokens were written left nothing to keep; `alone` rules out that it still runs.
    stale = alone and attrs is not None and not attrs["rows"] and not _is_as_asked(cfg, attrs, identity)
    if attrs is not None and not stale:
        refuse_other_identity(place, attrs, identity)
        _refuse_other_compression(cfg, place, attrs)
        rows = max(rows, attrs["rows"])
    if alone and attrs is not None:
        place.sweep()
    if attrs is None or attrs["rows"] < rows:
        commit.forget_index(beside(place))
        attrs = _lay_out(cfg, place, None if stale else attrs, identity, rows, stale)

    every = range(layout.num_units(rows, unit_rows))
    missing = sorted(set(every) - commit.committed_units(place))
    where = f"{place}: {rows * cfg.data.context:,} tokens, {len(every)} units, {', '.join(attrs['hookpoints'])}"
    if not layout.split(len(every), None)["test"]:
        print(f"{place} will have {len(every)} {layout.TOO_FEW}")
    if not missing:
        print(f"{where}: complete, nothing to do")
        return _say_loss(place)
    print(f"{where}: {len(missing)} units to capture")
    commit.forget_index(beside(place))
    from skipcoder.pipeline.capture import job

    job.run(place, attrs, missing, cfg.model, cfg.ray)
    if alone:
        place.sweep()  # a worker that was lost may have left a half-written file
    print(f"{where}: complete")
    _say_loss(place)


def _choose(cfg: CacheConfig, attrs: Attributes | None) -> None:
    """Fill in what was left to choose but for unit_rows: what the store was made with, or what suits a new one."""
    model = cfg.model
    if (cfg.ray.gpus_per_worker or 0) > 1:
        if model.shuffle is not None:
            raise UserError("model.shuffle permutes weights in memory, so it goes with one GPU: ray.gpus_per_worker=1")
        model.device_map = DeviceMap.auto
    if attrs is not None and attrs["rows"]:
        made = attrs["identity"]
        model.attention = model.attention or made["model"]["attention"]
        cfg.store.unit_rows = cfg.store.unit_rows or made["unit_rows"]
        cfg.micro_batch_tokens = cfg.micro_batch_tokens or made["micro_batch_tokens"]
    if model.attention is None:
        model.attention = load.attention_of(model)
        if model.attention != "sdpa":
            print(f"model.attention={model.attention}: this architecture has no sdpa")
    if cfg.micro_batch_tokens is None:
        import torch

        gpus = cfg.ray.gpus_per_worker
        has_gpu = torch.cuda.is_available() if gpus is None else gpus > 0
        cfg.micro_batch_tokens = 16384 if has_gpu else 4096


def _is_as_asked(cfg: CacheConfig, attrs: Attributes, identity: Identity) -> bool:
    asked = cfg.store.compression
    return attrs["identity"] == identity and asked in (None, Compression(compression_of(attrs)))


def _refuse_other_compression(cfg: CacheConfig, place: Place, attrs: Attributes) -> None:
    asked, has = cfg.store.compression, compression_of(attrs)
    if asked is not None and asked.value != has:
        raise UserError(
            f"{place} is compressed with {has}, not store.compression={asked.value}; leave that out, or make another "
            f"store of it: skipcoder-store recode {place} NEW --compression {asked.value}"
        )


def _say_loss(place: Place) -> None:
    store = ActivationStore.open(place)
    identity = store.attrs["identity"]
    if identity["codec"] == "bf16" and identity["model"]["dtype"] == "bfloat16":
        return  # nothing is lost, and with many hookpoints the statistics take gigabytes
    for name in store.hookpoints:
        lost = {side: store.moments(name, side, split=None).lost for side in widths_of(store.hookpoints[name])}
        if any(lost.values()):
            facts = ", ".join(f"{side} {fvu:.1e}" for side, fvu in lost.items())
            print(f"{name}: lost to {store.attrs['identity']['codec']}, as a fraction of variance: {facts}")


def _identity(cfg: CacheConfig, attrs: Attributes | None) -> Identity:
    """Everything that decides the store's content, except how many tokens it holds. `unit_rows` is 0 if it is yet to be
    chosen."""
    assert cfg.micro_batch_tokens is not None
    data = sources.identity(cfg.data)
    if cfg.data.has_chat:
        data["chat"] = set_template(load.load_tokenizer(cfg.model), cfg.data.chat_template)
    identity: Identity = {
        "model": load.identity(cfg.model),
        "data": data,
        "context": cfg.data.context,
        "repeat": cfg.data.repeat,
        "hookpoints": sorted(cfg.hookpoints),
        "write_modules": dict(cfg.model.write_modules),
        "codec": cfg.store.codec,
        "codec_revision": REVISION,
        "unit_rows": cfg.store.unit_rows or 0,
        "micro_batch_tokens": cfg.micro_batch_tokens,
        "seed": cfg.seed,
    }
    if attrs is None or not attrs["rows"] or "split_scheme" in attrs["identity"]:
        identity |= {"split_scheme": BY_DOCUMENT, "held_out_rows": cfg.data.held_out_rows}
    return identity


def _lay_out(
    cfg: CacheConfig, place: Place, attrs: Attributes | None, identity: Identity, rows: int, stale: bool
) -> Attributes:
    """Create a store (`attrs` None), replace a `stale` one or grow an existing one; write its token rows. Return its
    new attributes."""
    tokenizer = load.load_tokenizer(cfg.model)
    if cfg.data.has_chat:
        set_template(tokenizer, cfg.data.chat_template)
    if attrs is None or not attrs["rows"]:
        found = load.describe(cfg.model, cfg.hookpoints, cfg.data.context)
        facts: dict[str, HookpointFacts] = {}
        for h in found.hookpoints:
            facts[h.name] = {"read": h.read, "write": h.write, "gained": found.gained[h.name]}
            if "input" in found.widths[h.name]:
                facts[h.name]["d_in"] = found.widths[h.name]["input"]
            if "output" in found.widths[h.name]:
                facts[h.name]["d_out"] = found.widths[h.name]["output"]
        writing = {h.name: h.write for h in found.hookpoints if h.write != h.read and not h.is_named}
        identity.pop("found_writing", None)
        if writing:
            identity["found_writing"] = writing
        software = ("skipcoder", "torch", "transformers", "zarr", "numcodecs", "numpy")
        described: Described = {
            "identity": identity,
            "hookpoints": facts,
            "model": _plain(asdict(replace(cfg.model, max_memory={}, offload_folder=None))),  # are this machine's
            "data": {key: value for key, value in _plain(asdict(cfg.data)).items() if key != "tokens"},  # it may grow
            "special_tokens": sorted(tokenizer.all_special_ids),
            "bos": beginning(tokenizer) if cfg.data.separate else bos_of(tokenizer),
            "software": {name: version(name) for name in software},
        }
        if stale:
            place.clear()
        attrs = writer.create(place, new_attrs(described, (cfg.store.compression or Compression.zstd).value))
        _say_what_is_gained(attrs["hookpoints"])
    source = neighbour_with(place, identity, rows, identity["unit_rows"])
    if source is not None:
        print(f"taking the token rows of {source.place}")
        token_rows = source.text(rows)
    else:
        print(f"tokenising {rows * cfg.data.context:,} tokens")
        token_rows = rows_of(cfg.data, tokenizer, rows, identity["unit_rows"] if "split_scheme" in identity else None)
    writer.write_tokens(place, attrs, rows, token_rows)
    now = read_attrs(place)
    assert now is not None
    return now


def _say_what_is_gained(hookpoints: dict[str, HookpointFacts]) -> None:
    """Say where y is not the hooked module's own output, or may not be what the residual stream gains."""
    for name, facts in hookpoints.items():
        gained = facts.get("gained", facts["write"])  # an earlier version may have begun the store
        if gained == facts["write"]:
            if facts["write"] != facts["read"]:
                print(f"{name}: y is the output of {facts['write']}, which is what the residual stream gains")
        elif gained is None:
            print(f"{name}: whether the output of {facts['write']} is what the residual stream gains is not known")
        else:
            print(f"{name}: y is the output of {facts['write']}; the residual stream gains that of {gained}")


def _plain(value: Any) -> Any:
    """Replace enums by their values, so that JSON can hold a configuration."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="cache")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    config = typed(cfg, CacheConfig)
    capture(config)


def cli_main() -> None:
    """Console script `skipcoder-cache`."""
    sys.exit(cli.run(main, "cache"))


if __name__ == "__main__":
    cli_main()
