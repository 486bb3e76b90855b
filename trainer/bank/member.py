"""One coder in a bank: a run in progress, what it logs and the files it leaves."""

import time
from pathlib import Path
from typing import Any, cast

import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.loggers import Logger, loggers
from skipcoder.trainer.coder.files import FOLDER
from skipcoder.trainer.coder.shard import Shard
from skipcoder.trainer.config import ActivationName, TrainConfig
from skipcoder.trainer.data.batch import Batch
from skipcoder.trainer.data.ranks import ALONE, Ranks
from skipcoder.trainer.data.stream import ActivationStream, Position
from skipcoder.trainer.run.build import any_learner, hookpoints, token_filter, used
from skipcoder.trainer.run.checkpoint import State, load_state, save_state
from skipcoder.trainer.run.provenance import provenance
from skipcoder.trainer.run.run import MetricsLine, RunDirectory, Summary
from skipcoder.trainer.step.cross_layer import AnyLearner


class Member:
    """A run in progress. Cheap to make; `start` builds the learner."""

    def __init__(self, cfg: TrainConfig, directory: Path) -> None:
        """Raise UserError if the directory holds a run of another configuration."""
        self.cfg, self.directory, self.files = cfg, directory, RunDirectory(directory)
        self.files.refuse_other(cfg)
        self.steps = -(-cfg.train.tokens // cfg.train.batch_tokens)
        self.label = f"{cfg.coder.kind} k={cfg.coder.k} width={cfg.coder.width}"
        if cfg.coder.activation != ActivationName.topk:
            self.label += f" {cfg.coder.activation}"
        self.window: list[dict[str, torch.Tensor]] = []
        self.read_ms: list[float] = []
        self.seconds_before = 0.0
        self.loggers: list[Logger] = []
        self.last: MetricsLine | None = None
        """The latest line of metrics."""
        self.bank_coders = 1
        """Coders that were trained together, and share the time."""
        self._learner: AnyLearner | None = None

    @property
    def summary(self) -> Summary | None:
        """The summary of a finished run."""
        return self.files.summary

    @property
    def learner(self) -> AnyLearner:
        """The learner of a member that has started and has not been released."""
        assert self._learner is not None
        return self._learner

    # ---- training ---------------------------------------------------------------------------------

    def start(
        self, store: ActivationStore, stream: ActivationStream, device: str, ranks: Ranks = ALONE
    ) -> Position | None:
        """Build the learner, from the last save if any; return the stream's position, None at the beginning."""
        self.store, self.hookpoints = store, hookpoints(self.cfg, store)
        self.ranks = ranks
        with ranks.together():
            shard = Shard(ranks.latents, self.cfg.coder.width)
            state = load_state(self.directory, shard.rows if self.cfg.train.shards > 1 else None)
        self._learner = any_learner(self.cfg, store, self.hookpoints, self.steps, device, state is None, ranks)
        with ranks.together():
            return self._go_on(state, stream)

    def _go_on(self, state: State | None, stream: ActivationStream) -> Position | None:
        """Begin, or take up the last save; the first process writes."""
        is_main = self.ranks.is_main
        if is_main:
            self.files.write_config(self.cfg)
        self.begun = time.perf_counter()
        self.loggers = loggers(self.cfg, self.directory) if is_main else []
        if state is None:
            if is_main:
                self.files.write_metrics([])
            return None
        stream.load_state_dict(state["stream"])
        self.learner.load_state_dict(state["learner"])
        for logger in self.loggers:
            logger.go_on_after(self.learner.step_number)
        self.window, self.seconds_before = state["window"], state["seconds"]
        kept = [line for line in self.files.metrics if line["step"] <= self.learner.step_number]
        self.last = kept[-1] if kept else None
        if is_main:
            self.files.write_metrics(kept)
            print(f"{self.directory}: going on from step {self.learner.step_number} of {self.steps}")
        return state["stream"]

    @property
    def done(self) -> int:
        """Number of steps made."""
        if self._learner is not None:
            return self._learner.step_number
        return self.last["step"] if self.last else 0

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.done == self.steps

    def step(self, batch: Batch, read_ms: float, held_out: Batch | None) -> None:
        """Make one optimiser step, and write a line of metrics if one is due."""
        self.window.append(self.learner.step(*self._sides(batch), batch.tokens))
        self.read_ms.append(read_ms)
        every, step = self.cfg.train.log_every, self.learner.step_number
        if self.finished:
            self._calibrate()
        if self.finished or step % every == 0:
            line = self._line()
            evaluate_every = self.cfg.train.eval_every or max(self.steps // 10, 1)
            if held_out is not None and (self.finished or step % evaluate_every < every):
                fvus = self.learner.fvus(*self._sides(held_out))
                line["validation_fvu"] = sum(fvus) / len(fvus)
                if len(fvus) > 1:
                    line |= {f"validation_fvu_side_{s}": fvu for s, fvu in enumerate(fvus)}  # type: ignore[typeddict-item]
            self.last = line
            if self.ranks.is_main:
                self.files.append_metrics(line)
                for logger in self.loggers:
                    logger.write(line)

    def _sides(self, batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What enters and what leaves the MLP at each of its hookpoints."""
        return batch.side(self.hookpoints, "input"), batch.side(self.hookpoints, "output")

    def _line(self) -> MetricsLine:
        mean = {key: sum(float(w[key]) for w in self.window) / len(self.window) for key in self.window[0]}
        read_ms = sum(self.read_ms) / len(self.read_ms)
        self.window.clear()
        self.read_ms.clear()
        learner = self.learner
        if not (mean["fvu"] < float("inf")):
            raise UserError(
                f"{self.label}: the loss is {mean['fvu']} at step {learner.step_number}; "
                f"lower optim.lr (it is {learner.optimiser.base_lr:g})"
            )
        line: dict[str, Any] = {
            "step": learner.step_number,
            "tokens": learner.tokens,
            **mean,
            "dead": learner.dead,
            "density": learner.density,
            "encode_mode": learner.coder.search.mode,
            "recall": learner.recall,
            "lr": learner.optimiser.lr,
            "ms": {"read": round(read_ms, 3), **learner.clock.read()},
            "seconds": round(self.seconds, 3),
        }
        return cast(MetricsLine, line)

    @property
    def seconds(self) -> float:
        """Seconds spent in training, over all resumptions."""
        return self.seconds_before + time.perf_counter() - self.begun

    def _calibrate(self) -> None:
        """Let the activation see training tokens once more, if it asks for them."""
        tokens = self.learner.activation.calibration_tokens
        if tokens:
            device, kept = self.learner.coder.W_enc.device, token_filter(self.cfg, self.store)
            start = ActivationStream(
                self.store, self.hookpoints, tokens, filter=kept, epochs=1, device=device,
                columns=used(self.cfg, self.hookpoints),
            )  # fmt: skip
            self.learner.calibrate(*self._sides(next(iter(start))))

    def release(self, finished: bool = False) -> None:
        """Free the learner's memory and close the loggers."""
        for logger in self.loggers:
            logger.close(finished)
        self.loggers = []
        self._learner = None

    # ---- files ------------------------------------------------------------------------------------

    def save(self, stream: Position) -> None:
        """Save the point from which an interrupted run resumes; `stream`: the position after the last step."""
        state: State = {
            "learner": self.learner.state_dict(),
            "stream": stream,
            "window": [{key: value.cpu() for key, value in w.items()} for w in self.window],
            "seconds": self.seconds,
        }
        save_state(state, self.learner.coder.latents, self.directory, self.ranks)

    def finish(self) -> Summary:
        """Write the coder and the summary."""
        assert self.last is not None
        with self.ranks.together():
            coder = self.learner.folded()
            coder.meta = provenance(self.store, self.hookpoints, token_filter(self.cfg, self.store), self.learner)
        summary: Summary = {
            "kind": self.cfg.coder.kind,
            "k": self.cfg.coder.k,
            "width": self.cfg.coder.width,
            "activation": self.cfg.coder.activation,
            "side": self.cfg.coder.side.value,
            "hookpoint": coder.meta["hookpoint"],
            "model": self.store.attrs["model"]["name"],
            "seed": self.cfg.seed,
            "train_tokens": self.learner.tokens,
            "steps": self.steps,
            "train_fvu": self.last["fvu"],
            "validation_fvu": self.last.get("validation_fvu"),
            "l0": self.last["l0"],
            "dead": self.last["dead"],
            "encode_mode": self.last["encode_mode"],
            "chunk_bytes": self.learner.coder.search.chunk_bytes,
            "seconds": round(self.seconds, 2),
            "bank_coders": self.bank_coders,
        }
        if "sides" in coder.meta:
            line: dict[str, Any] = dict(self.last)
            summary["sides"] = [
                {
                    "hookpoint": facts["hookpoint"],
                    "side": facts["side"],
                    "train_fvu": line.get(f"fvu_side_{s}", line["fvu"]),
                    "validation_fvu": line.get(f"validation_fvu_side_{s}", line.get("validation_fvu")),
                }
                for s, facts in enumerate(coder.meta["sides"])
            ]
        with self.ranks.together():
            if self.ranks.data.is_main:
                coder.save(self.directory / FOLDER)
        with self.ranks.together():
            if self.ranks.is_main:
                self.files.write_summary(summary)
        if self.ranks.is_main and summary["train_fvu"] > 1:
            print(
                f"{self.directory}: its FVU is {summary['train_fvu']:.3g}, worse than always answering the mean: "
                f"lower optim.lr (it was {self.learner.optimiser.base_lr:g})"
            )
        return summary
