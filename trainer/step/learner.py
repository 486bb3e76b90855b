"""One coder in training: parameters, optimiser, schedule and dead-latent counts, and the step that moves them.

Legend: B tokens of a batch, M latents, E output width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from skipcoder.kernels.backend import in_triton
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.coder.activations.base import Step
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.encoding import available, make_search, more_exact, recall
from skipcoder.trainer.coder.fold import fold
from skipcoder.trainer.coder.shard import EVERYWHERE, Shard
from skipcoder.trainer.config import TrainConfig
from skipcoder.trainer.data.ranks import ALONE, Ranks
from skipcoder.trainer.data.turns import in_turns
from skipcoder.trainer.step.clock import Clock
from skipcoder.trainer.step.gradients import Gradients, normalise_rows
from skipcoder.trainer.step.graph import Graphs, fixed
from skipcoder.trainer.step.losses import Losses, Written, losses
from skipcoder.trainer.step.optimisers import build_optimiser, schedule
from skipcoder.trainer.step.sides import Parts, Row, coder_between, sides
from skipcoder.trainer.step.state import LearnerState

DENSITY_TOKENS = 2**20
DENSE = 0.1


class Learner:
    """Trains one coder on raw activations; knows nothing of files or sweeps.

    `x` and `y` are what enters and what leaves the MLP; of several hookpoints, sequences with a tensor for each. What
    the coder does not use may be missing.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        x: Moments | Sequence[Moments],
        y: Moments | Sequence[Moments],
        steps: int,
        device: str,
        ranks: Ranks = ALONE,
        in_bfloat16: bool = False,
    ) -> None:
        """`x` and `y`: moments of what is read and what is written, over the training units; `in_bfloat16`: whether all
        inputs are numbers that bfloat16 holds."""
        self.cfg, self.steps, self.step_number, self.tokens, self.ranks = cfg, steps, 0, 0, ranks
        self.unit_norm = cfg.coder.reconstructs and cfg.coder.normalize_decoder
        self.sides = sides(cfg.coder)
        self.reads, self.writes = (Row.of([m] if isinstance(m, Moments) else m) for m in (x, y))
        shard = Shard(ranks.latents, cfg.coder.width) if ranks.latents.size > 1 else None
        mean_x, mean_y = self.reads.mean_D, self.writes.mean_D
        self.coder = coder_between(cfg, self.reads, self.writes, shard).to(device)
        self.activation = self.coder.activation
        self.coder.search = make_search(cfg.encode, mean_x, self.reads.variance_D, device, cfg.coder.width)
        self.recall = 1.0
        self.clock = Clock(device)
        self.coder.init_biases(mean_x, mean_y)
        self.optimiser = build_optimiser(cfg.optim, self.coder)
        here = len(self.coder.latents)
        self.since_fired_M = torch.zeros(here, dtype=torch.int64, device=device)
        self.density_M = torch.zeros(here, device=device)
        """How often each latent fires per token: the mean so far, later a moving average over DENSITY_TOKENS."""
        self.in_bfloat16 = in_bfloat16
        self.density_weight = torch.zeros((), device=device)
        unsummed = ranks.data.size == 1 and self.optimiser.takes_sums and cfg.train.micro_batches == 1
        self.gradients = Gradients(self.coder, self.unit_norm, unsummed=unsummed)
        can = device.startswith("cuda") and ranks.size == 1 and cfg.train.graph and self.activation.is_static
        self.graphs = Graphs() if can else None
        self.halves: dict[nn.Parameter, Tensor] = {}
        self.meet: Callable[[Tensor], Tensor] | None = None
        """Where it meets others that write to the same sides; see `losses`."""
        self.has_dead = False
        """Whether a latent was dead when last looked at."""
        self.dead_tokens = cfg.train.dead_tokens or min(10_000_000, max(1, cfg.train.tokens // 4))

    def step(self, x: Parts, y: Parts, batch_tokens: int) -> dict[str, Tensor]:
        """Make one optimiser step on this rank's raw tokens. Returns 0-d tensors, so that nothing waits for the device:
        `fvu` (against the training units' variance) and the loss's other terms, `l0`, `grad_norm`."""
        self.clock.start()
        graphed = self.graphs is not None and batch_tokens == self.cfg.train.batch_tokens and self.k == self.coder.cfg.k
        x, y = self._rows(x, y, fixed_memory=graphed)
        self._keep_half()
        if self.step_number % self.cfg.train.log_every == 0:
            self._check_recall(x)
            self.has_dead = bool(self.cfg.loss.auxk) and self.dead > 0
        if self.step_number == 0:
            self.activation.begin(self.coder, x, self.k, self.ranks)
        self.optimiser.set_rate(schedule(self.cfg.optim, self.step_number, self.steps))
        self.density_weight.fill_(
            max(batch_tokens / (self.tokens + batch_tokens), min(batch_tokens / DENSITY_TOKENS, 1.0))
        )
        make = partial(self._move, x, y, batch_tokens)
        if graphed and self.graphs is not None and self.step_number > 0:
            key = len(x), self.coder.search.mode, self.has_dead, bool(self.halves)
            results = self.graphs.run(key, make)
        else:
            results = make()
        self.step_number += 1
        self.tokens += batch_tokens
        self.clock.lap("optimiser" if self.graphs is None else "step")
        return results

    def _move(self, x: Tensor, y: Tensor, batch_tokens: int) -> dict[str, Tensor]:
        """Move the parameters. On a GPU nothing here may wait for the device, nor depend on the number of the step."""
        self.coder.zero_grad(set_to_none=True)  # a capture that failed leaves gradients that were never computed
        with self.gradients.collecting(x if self.in_bfloat16 else None):
            parts, fired_M = self._backward(x, y, batch_tokens)
        norm = self.gradients.clip(self.cfg.optim.clip)
        sums, W_dec = self.gradients.left, self.coder.W_dec
        self.gradients.left = {}  # a graph would keep its memory from others
        self.optimiser.step(sums, W_dec if self.unit_norm else None, self.halves)
        if self.unit_norm and W_dec not in sums:
            for copy in self.optimiser.copies(W_dec):
                normalise_rows(copy)
        self.since_fired_M.add_(batch_tokens).masked_fill_(fired_M > 0, 0)
        self.density_M.lerp_(fired_M / batch_tokens, self.density_weight)
        fired = fired_M.sum()
        self.ranks.latents.sum(fired)
        return {**parts, "l0": fired / batch_tokens, "grad_norm": norm}

    def _backward(self, x: Tensor, y: Tensor, batch_tokens: int) -> tuple[dict[str, Tensor], Tensor]:
        """Set gradients; return the loss's terms and how often each latent fired [M], over micro-batches and ranks."""
        parts: dict[str, Tensor] = {}
        fired_M = torch.zeros_like(self.since_fired_M)
        step = self.activation.step(self.coder, self.k, self.ranks)

        def work(x: Tensor, y: Tensor) -> None:
            loss = self.losses(step, x, y, batch_tokens)
            step.backward(batch_tokens)
            loss.total.backward()
            for name, term in loss.parts.items():
                parts[name] = parts.get(name, 0) + term.detach()
            fired_M.add_(loss.fired_M)
            self.clock.lap("backward")

        pieces = min(self.cfg.train.micro_batches, max(len(x), 1))
        works = [partial(work, *pair) for pair in zip(x.chunk(pieces), y.chunk(pieces), strict=True)]
        if self.ranks.latents.size > 1 and type(step) is Step:  # others remember the micro-batch at hand
            in_turns(works)
        else:
            for one in works:
                one()
        of_batch = step.finish(self.cfg.loss.l0, self.step_number == 0)
        grads = {name: p.grad for name, p in self.coder.named_parameters() if p.grad is not None}
        self.ranks.data.sum(*grads.values(), *parts.values(), fired_M)
        if self.ranks.data.size > 1:  # the columns of the mesh may add in different orders
            self.ranks.latents.share(*(grads[name] for name in EVERYWHERE if name in grads))
        return parts | of_batch, fired_M

    def losses(self, step: Step, x: Tensor, y: Tensor, batch_tokens: int) -> Losses:
        """Return the losses of scaled pairs that are part of a global batch."""
        # On a GPU, whether any are dead is known from fixed steps only: to ask would be to wait.
        looked_at = self.cfg.loss.auxk and (self.has_dead or not in_triton(self.since_fired_M))
        dead_M = self.since_fired_M >= self.dead_tokens if looked_at else None
        variances = [batch_tokens * variance for variance in self.writes.variances]
        written = Written(self.writes.widths, variances, self.cfg.coder.over_layers)
        return losses(self.coder, self.cfg.loss, step, x, y, written, dead_M, self.clock.lap, self.meet)

    @property
    def k(self) -> int:
        """Latents active per token in the next step."""
        k, start = self.cfg.coder.k, self.cfg.train.k_start
        left = 1 - self.step_number / (self.cfg.train.k_anneal * self.steps)
        return k + round((start - k) * left) if start is not None and left > 0 else k

    @contextmanager
    def as_saved(self) -> Iterator[SparseCoder]:
        """Yield the coder as it would be saved now (in its own scale): averaged weights, exact search."""
        search, weights = self.coder.search, [p.data for p in self.coder.parameters()]
        self.coder.eval().search = search._replace(mode="float32")
        for p in self.coder.parameters():
            p.data = self.optimiser.averaged(p).data
        if self.unit_norm and self.optimiser.schedule_free:  # an average of unit rows is shorter
            normalise_rows(self.coder.W_dec)
        try:
            yield self.coder
        finally:
            for p, data in zip(self.coder.parameters(), weights, strict=True):
                p.data = data
            self.coder.train().search = search

    def calibrate(self, x: Parts, y: Parts) -> None:
        """Let the activation calibrate itself on some raw tokens after training."""
        with self.as_saved() as coder:
            self.activation.calibrate(coder, self._rows(x, y)[0])

    @torch.no_grad()
    def fvus(self, x: Parts, y: Parts) -> list[float]:
        """Return the FVU of raw tokens on each side that is written, with the weights that would be saved now: squared
        error over squared distance from the mean."""
        x, y = self._rows(x, y)
        with self.as_saved() as coder:
            error = y.double() - coder.decode(coder.encode(x), x).double()
        spread = y.double() - y.double().mean(0)
        squares = zip(*(z.square().split(list(self.writes.widths), 1) for z in (error, spread)), strict=True)
        return [float(missed.sum() / of.sum()) for missed, of in squares]

    def folded(self) -> SparseCoder:
        """Return the coder to save, for raw activations, on the CPU."""
        with self.as_saved() as coder:
            return fold(coder, self.reads.scale, self.writes.scale).eval().cpu()

    def _rows(self, x: Parts, y: Parts, fixed_memory: bool = False) -> tuple[Tensor, Tensor]:
        """Return rows of what the coder reads and of what it should write; `fixed_memory`: where graphs read."""
        parts, memory = {"input": x, "output": y}, fixed if fixed_memory else None
        reads = self.reads.made("x", parts[self.sides.read], memory)
        if self.sides.read == self.sides.write:
            return reads, reads
        return reads, self.writes.made("y", parts[self.sides.write], memory)

    def _keep_half(self) -> None:
        """On a GPU, hold W_enc in bfloat16 if that is how latents are searched for. The optimiser brings it up to date;
        whatever else changes the weights raises their version."""
        search, W_enc = self.coder.search, self.coder.W_enc
        if search.mode != "bfloat16" or not in_triton(W_enc):
            return
        if not self.halves:
            self.halves, self.half_version = {W_enc: torch.empty_like(W_enc, dtype=torch.bfloat16)}, -1
            self.coder.search = search._replace(W_half_MD=self.halves[W_enc])
        if W_enc._version != self.half_version:
            self.halves[W_enc].copy_(W_enc.detach())
            self.half_version = W_enc._version

    def _check_recall(self, x: Tensor) -> None:
        """Measure recall, and switch to a more exact mode if it is too low."""
        if not self.coder.search.is_exact:
            self.recall = recall(self.coder, x)
            if self.ranks.any(self.recall < self.cfg.encode.min_recall):
                self.coder.search = more_exact(self.coder.search)

    @property
    def dead(self) -> int:
        """Number of latents that have not fired for `dead_tokens` tokens."""
        return self.ranks.latents.total(int((self.since_fired_M >= self.dead_tokens).sum()))

    @property
    def density(self) -> dict[str, float]:
        """The median of latents' firing densities, and the share of latents that fire on more than a tenth of all
        tokens."""
        all_M = self.ranks.latents.stack(self.density_M)
        return {"median": float(all_M.median()), "dense": float((all_M > DENSE).float().mean())}

    def state_dict(self) -> LearnerState:
        """Return all that `step` depends on."""
        return {
            "coder": self.coder.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "since_fired": self.since_fired_M,
            "density": self.density_M,
            "encode_mode": self.coder.search.mode,
            "chunk_bytes": self.coder.search.chunk_bytes,
            "recall": self.recall,
            "has_dead": self.has_dead,
            "step": self.step_number,
            "tokens": self.tokens,
        }

    def load_state_dict(self, state: LearnerState) -> None:
        """Continue bit for bit from a state of the same configuration."""
        self.coder.load_state_dict(state["coder"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.since_fired_M.copy_(state["since_fired"])
        self.density_M.copy_(state["density"])
        self.step_number, self.tokens, self.recall = state["step"], state["tokens"], state["recall"]
        self.has_dead = state.get("has_dead", False)
        search = self.coder.search
        mode, device = state["encode_mode"], str(self.since_fired_M.device)
        self.coder.search = search._replace(
            mode=mode if available(mode, device) else "bfloat16",  # it may have begun on another device
            chunk_bytes=state.get("chunk_bytes", search.chunk_bytes),
        )
