"""Train one coder into a run directory: refuse, resume, loop, save.

A run directory holds config.yaml, metrics.jsonl, checkpoint/ and, once it is finished, summary.json.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from skipcoder.pipeline import cli
from skipcoder.pipeline.commit import write_atomically
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer import checkpoint
from skipcoder.trainer.config import Kind, SkipInit, TrainConfig
from skipcoder.trainer.learner import Learner, sides
from skipcoder.trainer.skip_init import ridge
from skipcoder.trainer.stream import ActivationStream, TokenFilter

# What may differ between a run and its resumption: it does not change what is learned.
_FREE_KEYS = ("run", "train.device", "train.threads", "train.save_every")


def train(cfg: TrainConfig, directory: Path) -> dict[str, Any]:
    """Train to the end and return the summary; a finished run returns its summary at once."""
    cfg.store.path = str(_store_path(cfg))  # as found, so that the run's configuration names it
    store = ActivationStore.open(cfg.store.path)
    if not store.is_complete:
        raise UserError(
            f"{store.path} has only {len(store.units)} of its units; finish it: run the same capture command again"
        )
    hookpoint = store.hookpoint(cfg.hookpoint)
    refuse_other_config(cfg, directory)
    if (directory / "summary.json").exists():
        print(f"{directory}: finished before, nothing to do")
        return json.loads((directory / "summary.json").read_text())
    device = pick_device(cfg.train.device)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    stream = ActivationStream(
        store,
        hookpoint,
        cfg.train.batch_tokens,
        seed=cfg.stream.seed,
        filter=TokenFilter(cfg.stream.first_positions, cfg.stream.special_tokens),
        pool_chunks=cfg.stream.pool_chunks,
        device=device,
    )
    steps = -(-cfg.train.tokens // cfg.train.batch_tokens)
    state = checkpoint.load_state(directory / "checkpoint")
    learner = make_learner(cfg, store, hookpoint, steps, device, fresh=state is None)
    write_atomically(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg)).encode())
    seconds = _resume(state, learner, stream, directory)
    seconds = _loop(learner, stream, directory, cfg, seconds)

    coder = learner.folded()
    coder.meta = provenance(store, hookpoint, learner)
    checkpoint.save_coder(coder, directory / "checkpoint")
    last = _read_metrics(directory)[-1]
    summary = {
        "kind": cfg.coder.kind.value,
        "k": cfg.coder.k,
        "width": cfg.coder.width,
        "hookpoint": hookpoint,
        "model": store.attrs["model"]["name"],
        "seed": cfg.seed,
        "train_tokens": learner.tokens,
        "steps": steps,
        "train_fvu": last["fvu"],
        "l0": last["l0"],
        "dead": last["dead"],
        "seconds": round(seconds, 2),
    }
    write_atomically(directory / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def make_learner(
    cfg: TrainConfig, store: ActivationStore, hookpoint: str, steps: int, device: str, fresh: bool = True
) -> Learner:
    """A learner that starts from the statistics of the store's training units."""
    kept = TokenFilter(cfg.stream.first_positions, cfg.stream.special_tokens)
    x, y = (store.moments(hookpoint, side, positions=kept.classes) for side in sides(cfg.coder))
    learner = Learner(cfg, x, y, steps, device)
    if fresh and cfg.coder.kind is Kind.skip_transcoder and cfg.coder.skip_init is SkipInit.ridge:
        learner.start_skip(*ridge(ActivationStream(store, hookpoint, 8192, filter=kept, epochs=1), len(x.mean)))
    return learner


def refuse_other_config(cfg: TrainConfig, directory: Path) -> None:
    """UserError naming the keys in which the run in `directory` was configured otherwise."""
    file = directory / "config.yaml"
    if not file.exists():
        return
    then, now = (OmegaConf.to_container(c, enum_to_str=True) for c in (OmegaConf.load(file), OmegaConf.structured(cfg)))
    facts = cli.differences(then, now, ignore=_FREE_KEYS)
    if facts:
        raise UserError(f"{directory} holds another run ({facts}); choose another directory, or delete it")


def pick_device(asked: str | None, key: str = "train.device") -> str:
    """The asked device, if it is there; without a wish, cuda before cpu."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{key}={asked}, but torch sees no GPU here; use cpu, or leave it null")
    try:
        return str(torch.empty(0, device=asked).device)
    except RuntimeError as error:
        raise UserError(f"{key}={asked}: {str(error).splitlines()[0]}") from None


def provenance(store: ActivationStore, hookpoint: str, learner: Learner) -> dict[str, Any]:
    """Where a coder came from and where it attaches, for coder.json."""
    facts = store.hookpoints[hookpoint]
    site = {
        "input": {"module": facts["read"], "side": "input"},
        "output": {"module": facts["write"], "side": "output"},
    }
    read, write = learner.sides
    return {
        "model": store.attrs["identity"]["model"],
        "hookpoint": hookpoint,
        "read": site[read],
        "write": site[write],
        "scales": {"input": learner.scales.s_in, "output": learner.scales.s_out, "folded": True},
        "data": {
            "store_identity": store.attrs["identity_hash"],
            "source": store.attrs["data"],
            "train_tokens": learner.tokens,
            "filter": {
                "first_positions": learner.cfg.stream.first_positions,
                "special_tokens": learner.cfg.stream.special_tokens,
            },
        },
        "seed": learner.cfg.seed,
    }


def _loop(
    learner: Learner, stream: ActivationStream, directory: Path, cfg: TrainConfig, seconds_before: float
) -> float:
    """Step to the end. Returns the seconds spent in training, over all resumptions."""
    begun = time.perf_counter()
    window: list[dict[str, torch.Tensor]] = []
    label = f"{cfg.coder.kind.value} k={cfg.coder.k} width={cfg.coder.width}"
    with (
        cli.progress(label, learner.steps, "steps") as advance,
        _metrics_file(directory).open("a") as metrics,
    ):
        advance(learner.step_number)
        for batch in stream:
            if learner.step_number == learner.steps:
                break
            window.append(learner.step(batch.x, batch.y, batch.tokens))
            is_last = learner.step_number == learner.steps
            line = None
            if is_last or learner.step_number % cfg.train.log_every == 0:
                line = _metrics_line(learner, window, seconds_before + time.perf_counter() - begun)
                window.clear()
                if not (line["fvu"] < float("inf")):
                    raise UserError(
                        f"{label}: the loss is {line['fvu']} at step {line['step']}; "
                        f"lower optim.lr (it is {learner.optimiser.base_lr:g})"
                    )
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
            advance(1, **({"fvu": f"{line['fvu']:.4f}", "dead": line["dead"]} if line else {}))
            # Only where a metrics line ends, so that a resumed run averages over the same windows.
            if line and (is_last or learner.step_number % cfg.train.save_every < cfg.train.log_every):
                seconds = seconds_before + time.perf_counter() - begun
                state = {"learner": learner.state_dict(), "stream": stream.state_dict(), "seconds": seconds}
                checkpoint.save_state(state, directory / "checkpoint")
            if is_last:
                break
    return seconds_before + time.perf_counter() - begun


def _metrics_line(learner: Learner, window: list[dict[str, torch.Tensor]], seconds: float) -> dict[str, Any]:
    mean = {key: float(torch.stack([w[key] for w in window]).double().mean()) for key in window[0]}
    return {
        "step": learner.step_number,
        "tokens": learner.tokens,
        **mean,
        "dead": learner.dead,
        "encode_mode": learner.coder.encoding.mode,
        "recall": learner.recall,
        "lr": learner.optimiser.lr,
        "seconds": round(seconds, 3),
    }


def _resume(state: dict[str, Any] | None, learner: Learner, stream: ActivationStream, directory: Path) -> float:
    """Go to the saved state if there is one, and cut metrics.jsonl back to it. Returns seconds spent."""
    if state is None:
        _metrics_file(directory).unlink(missing_ok=True)
        return 0.0
    learner.load_state_dict(state["learner"])
    stream.load_state_dict(state["stream"])
    kept = [line for line in _read_metrics(directory) if line["step"] <= learner.step_number]
    write_atomically(_metrics_file(directory), "".join(json.dumps(line) + "\n" for line in kept).encode())
    print(f"{directory}: going on from step {learner.step_number} of {learner.steps}")
    return float(state["seconds"])


def _metrics_file(directory: Path) -> Path:
    return directory / "metrics.jsonl"


def _read_metrics(directory: Path) -> list[dict[str, Any]]:
    lines = []
    for line in _metrics_file(directory).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # a kill may cut the last line
            break
    return lines


def _store_path(cfg: TrainConfig) -> Path:
    if cfg.store.path is not None:
        return Path(cfg.store.path)
    found = sorted(Path("stores").glob("*.zarr"))
    if len(found) == 1:
        return found[0]
    have = f"stores/ holds {', '.join(p.name for p in found)}" if found else "there is none under stores/"
    raise UserError(f"store.path is not set and {have}; set it, or capture with: python pipeline/cache.py")
