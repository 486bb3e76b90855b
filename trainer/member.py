"""One coder's run: its directory, its learner, what it logs and what it leaves behind.

A run directory holds config.yaml, metrics.jsonl, checkpoint/ and, once it is finished, summary.json.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from skipcoder.pipeline import cli
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.place import write_atomically
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer import checkpoint
from skipcoder.trainer.assemble import make_learner, provenance, token_filter
from skipcoder.trainer.board import Board, boards
from skipcoder.trainer.config import Activation, TrainConfig
from skipcoder.trainer.learner import Learner
from skipcoder.trainer.ranks import ALONE, Ranks
from skipcoder.trainer.stream import ActivationStream, Batch

CALIBRATION_TOKENS = 2**14
"""Training tokens on which batchtopk's final threshold is set."""

# What may differ between a run and its resumption: it does not change what is learned.
_FREE_KEYS = ("run", "train.device", "train.threads", "train.save_every", "train.tensorboard", "train.wandb")


class Member:
    """A run on its way. Made cheaply; `start` builds the learner."""

    learner: Learner
    boards: list[Board]

    def __init__(self, cfg: TrainConfig, directory: Path) -> None:
        self.cfg, self.directory = cfg, directory
        self.steps = -(-cfg.train.tokens // cfg.train.batch_tokens)
        self.label = f"{cfg.coder.kind} k={cfg.coder.k} width={cfg.coder.width}"
        self.window: list[dict[str, torch.Tensor]] = []
        self.read_ms: list[float] = []
        self.seconds_before = 0.0
        self.boards = []
        self.last: dict[str, Any] = {}
        """The latest line of metrics."""
        self.refuse_other_config()

    def refuse_other_config(self) -> None:
        """UserError naming the keys in which the run in this directory was configured otherwise."""
        file = self.directory / "config.yaml"
        if not file.exists():
            return
        then, now = (
            OmegaConf.to_container(c, enum_to_str=True) for c in (OmegaConf.load(file), OmegaConf.structured(self.cfg))
        )
        facts = cli.differences(then, now, ignore=_FREE_KEYS)
        if facts:
            raise UserError(f"{self.directory} holds another run ({facts}); choose another directory, or delete it")

    @property
    def summary(self) -> dict[str, Any] | None:
        """Of a finished run."""
        file = self.directory / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    # ---- training ---------------------------------------------------------------------------------

    def start(
        self, store: ActivationStore, stream: ActivationStream, device: str, ranks: Ranks = ALONE
    ) -> dict[str, Any] | None:
        """Build the learner, or go on from the last save; returns the stream's position, None at the beginning."""
        self.store, (self.hookpoint,) = store, stream.hookpoints
        state = checkpoint.load_state(self.directory / "checkpoint")
        self.learner = make_learner(self.cfg, store, self.hookpoint, self.steps, device, state is None, ranks)
        self.ranks = ranks
        self._write(self.directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.cfg)).encode())
        self.begun = time.perf_counter()
        self.boards = boards(self.cfg, self.directory) if ranks.is_main else []
        if state is None:
            if ranks.is_main:
                self._metrics_file.unlink(missing_ok=True)
            return None
        stream.load_state_dict(state["stream"])
        self.learner.load_state_dict(state["learner"])
        for board in self.boards:
            board.go_on_after(self.learner.step_number)
        self.window, self.seconds_before = state["window"], state["seconds"]
        kept = [line for line in self._read_metrics() if line["step"] <= self.learner.step_number]
        self.last = kept[-1] if kept else {}
        self._write(self._metrics_file, "".join(json.dumps(line) + "\n" for line in kept).encode())
        print(f"{self.directory}: going on from step {self.learner.step_number} of {self.steps}")
        return state["stream"]

    @property
    def done(self) -> int:
        """Steps made."""
        return self.learner.step_number if "learner" in self.__dict__ else self.last.get("step", 0)

    @property
    def finished(self) -> bool:
        """All steps are made."""
        return self.done == self.steps

    def step(self, batch: Batch, read_ms: float, held_out: Batch | None) -> None:
        """One optimiser step, and a line of metrics where one is due."""
        self.window.append(self.learner.step(batch.x, batch.y, batch.tokens))
        self.read_ms.append(read_ms)
        every, step = self.cfg.train.log_every, self.learner.step_number
        if self.finished:
            self._calibrate()
        if self.finished or step % every == 0:
            line = self._line()
            evaluate_every = self.cfg.train.eval_every or max(self.steps // 10, 1)
            if held_out is not None and (self.finished or step % evaluate_every < every):
                line["held_out_fvu"] = self.learner.fvu(held_out.x, held_out.y)
            self.last = line
            if self.ranks.is_main:
                with self._metrics_file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                for board in self.boards:
                    board.write(line)

    def _line(self) -> dict[str, Any]:
        mean = {key: sum(float(w[key]) for w in self.window) / len(self.window) for key in self.window[0]}
        read_ms = sum(self.read_ms) / len(self.read_ms)
        self.window.clear()
        self.read_ms.clear()
        if not (mean["fvu"] < float("inf")):
            raise UserError(
                f"{self.label}: the loss is {mean['fvu']} at step {self.learner.step_number}; "
                f"lower optim.lr (it is {self.learner.optimiser.base_lr:g})"
            )
        return {
            "step": self.learner.step_number,
            "tokens": self.learner.tokens,
            **mean,
            "dead": self.learner.dead,
            "density": self.learner.density,
            "encode_mode": self.learner.coder.encoding.mode,
            "recall": self.learner.recall,
            "lr": self.learner.optimiser.lr,
            "ms": {"read": round(read_ms, 3), **self.learner.clock.read()},
            "seconds": round(self.seconds, 3),
        }

    @property
    def seconds(self) -> float:
        """Spent in training, over all resumptions."""
        return self.seconds_before + time.perf_counter() - self.begun

    def _calibrate(self) -> None:
        """Give batchtopk its final threshold."""
        if self.cfg.coder.activation == Activation.batchtopk:
            device, kept = self.learner.coder.W_enc.device, token_filter(self.cfg)
            start = ActivationStream(
                self.store, self.hookpoint, CALIBRATION_TOKENS, filter=kept, epochs=1, device=device
            )
            batch = next(iter(start))
            self.learner.calibrate(batch.x, batch.y)

    def release(self, finished: bool = False) -> None:
        """Let go of the learner's memory and of what is watching."""
        for board in self.boards:
            board.close(finished)
        self.boards = []
        self.__dict__.pop("learner", None)

    # ---- files ------------------------------------------------------------------------------------

    def save(self, stream: dict[str, Any]) -> None:
        """The point from which an interrupted run goes on; `stream`: the position after the last step."""
        if not self.ranks.is_main:
            return
        state = {
            "learner": self.learner.state_dict(),
            "stream": stream,
            "window": [{key: value.cpu() for key, value in w.items()} for w in self.window],
            "seconds": self.seconds,
        }
        checkpoint.save_state(state, self.directory / "checkpoint")

    def finish(self) -> dict[str, Any]:
        """Write the coder and the summary."""
        coder = self.learner.folded()
        coder.meta = provenance(self.store, self.hookpoint, self.learner)
        if self.ranks.is_main:
            checkpoint.save_coder(coder, self.directory / "checkpoint")
        summary = {
            "kind": self.cfg.coder.kind,
            "k": self.cfg.coder.k,
            "width": self.cfg.coder.width,
            "activation": self.cfg.coder.activation,
            "side": self.cfg.coder.side.value,
            "hookpoint": self.hookpoint,
            "model": self.store.attrs["model"]["name"],
            "seed": self.cfg.seed,
            "train_tokens": self.learner.tokens,
            "steps": self.steps,
            "train_fvu": self.last["fvu"],
            "held_out_fvu": self.last.get("held_out_fvu"),
            "l0": self.last["l0"],
            "dead": self.last["dead"],
            "encode_mode": self.last["encode_mode"],
            "seconds": round(self.seconds, 2),
        }
        self._write(self.directory / "summary.json", json.dumps(summary, indent=2).encode())
        return summary

    def _write(self, path: Path, content: bytes) -> None:
        if self.ranks.is_main:
            write_atomically(path, content)

    @property
    def _metrics_file(self) -> Path:
        return self.directory / "metrics.jsonl"

    def _read_metrics(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        if self._metrics_file.exists():
            for line in self._metrics_file.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # a kill may cut the last line
                    break
        return lines
