"""From a prompt to the direct effects between everything that is active on it.

Sources are active latents, errors, and tokens; targets are logits and active latents. The edge of a source and a target
is what the source writes times the gradient of the target (a latent's pre-activation, or a logit less the mean logit)
there, along all paths through residual stream, attention and skips, in the linear model of replacement.py. A target's
edges and its constant, what reaches it from biases, add up to its value. The method is that of Ameisen et al. 2025 and
circuit-tracer.

Legend: R targets, C sources, S layers, T positions, K active latents, D read width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.evals.circuits.influence import normalised, partial_influence
from skipcoder.evals.circuits.replacement import Replacement

ROUNDS = 8
"""How often the latents still to be visited are ranked anew."""


class Latents:
    """The active latents of a prompt, in the order of layers, positions, and the coder's own."""

    def __init__(self, replacement: Replacement) -> None:
        active = [values > 0 for values in replacement.values]
        self.active = active
        """bool [T, K] of each layer."""
        self.layer = torch.cat([torch.full((int(a.sum()),), i) for i, a in enumerate(active)])
        """int64 [n]: index of the replaced layer."""
        self.position = torch.cat([a.nonzero()[:, 0].cpu() for a in active])
        self.latent = torch.cat([z[a].cpu() for z, a in zip(replacement.indices, active, strict=True)])
        self.activation = torch.cat([z[a].cpu() for z, a in zip(replacement.values, active, strict=True)])

    def __len__(self) -> int:
        return len(self.layer)


@dataclass
class Attribution:
    """Edges [R, C] between targets and sources. Targets are the `logits`, then the latents `visited`; sources are all
    latents, then errors by layer and position, then tokens by position."""

    latents: Latents
    layers: int
    positions: int
    logits: Tensor
    """int64: tokens of the vocabulary."""
    probabilities: Tensor
    """Of these tokens, by the model."""
    visited: Tensor
    """int64: numbers of latents."""
    edges_RC: Tensor
    constants_R: Tensor
    values_R: Tensor
    """Logits less the mean logit, and activations: what a row of edges and its constant add up to."""

    @property
    def error_column(self) -> int:
        """The first column of errors."""
        return len(self.latents)

    @property
    def token_column(self) -> int:
        """The first column of tokens."""
        return len(self.latents) + self.layers * self.positions

    def departure(self) -> float:
        """The largest |edges + constant - value| of a target, as a share of the sum of their absolute values."""
        total = self.edges_RC.double().sum(1) + self.constants_R.double()
        size = self.edges_RC.double().abs().sum(1) + self.constants_R.double().abs()
        return float(((total - self.values_R.double()).abs() / size).max())


class Attributor:
    """Computes rows of edges for a prompt."""

    def __init__(self, replacement: Replacement) -> None:
        self.replacement = replacement
        self.latents = Latents(replacement)
        self.embedding = replacement.embedding_TD.clone().requires_grad_()
        self.writes = [z.clone().requires_grad_() for z in replacement.writes]
        with torch.enable_grad():
            self.linear = replacement.run(self.embedding, self.writes)

    def latent_rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Edges [R, C] into the pre-activations of these latents, and their constants [R]."""
        layer, position = self.latents.layer[numbers], self.latents.position[numbers]
        like = self.embedding
        vectors: list[Tensor] = []
        constants = []
        for i, (s, p) in enumerate(zip(layer.tolist(), position.tolist(), strict=True)):
            coder = self.replacement.layers[s].coder
            assert coder is not None
            latent = int(self.latents.latent[numbers[i]])
            vector = coder.W_enc[latent].to(like.dtype)
            reads = self.replacement.from_constants.reads[s][p]
            constants.append(vector @ reads + coder.b_enc[latent].to(like.dtype))
            vectors.append(vector)
        return self._rows(layer, position, vectors), torch.stack(constants)

    def logit_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Edges [R, C] into the logits of these tokens at the last position, less the mean logit, and constants."""
        head = self.replacement.head
        W_VD = head.weight.detach().to(self.embedding.dtype)
        vectors = W_VD[tokens] - W_VD.mean(0)
        constants = vectors @ self.replacement.from_constants.final[-1]
        if getattr(head, "bias", None) is not None:
            constants = constants + (head.bias[tokens] - head.bias.mean()).to(constants)
        last = torch.full((len(tokens),), self.replacement.ids_T.shape[0] - 1)
        return self._rows(torch.full_like(last, len(self.writes)), last, list(vectors)), constants

    def _rows(self, layer: Tensor, position: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Edges into the products of vectors [D] and what layers (one past the last: the unembedding) read."""
        outputs, given = [], []
        reads = [*self.linear.reads, self.linear.final]
        for s in layer.unique().tolist():
            rows = (layer == s).nonzero()[:, 0]
            one = reads[s].new_zeros(len(layer), *reads[s].shape)
            one[rows, position[rows]] = torch.stack([vectors[i] for i in rows.tolist()])
            outputs.append(reads[s])
            given.append(one)
        before = self.writes[: int(layer.max())]
        gradients = torch.autograd.grad(
            outputs, [self.embedding, *before], given, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
        to_tokens, to_writes = gradients[0], gradients[1:]
        found, errors = [], []
        for s, active in enumerate(self.latents.active):
            if s >= len(before):
                found.append(to_tokens.new_zeros(len(layer), int(active.sum())))
                errors.append(to_tokens.new_zeros(len(layer), active.shape[0]))
                continue
            vectors_TKE, error_TE = self.replacement.vectors[s], self.replacement.errors[s]
            effects_TRK = torch.bmm(to_writes[s].transpose(0, 1), vectors_TKE.transpose(1, 2))
            found.append(effects_TRK.transpose(0, 1)[:, active])
            errors.append((to_writes[s] * error_TE).sum(-1))
        tokens = (to_tokens * self.embedding.detach()).sum(-1)
        return torch.cat([*found, *errors, tokens], 1)


def attribute(
    replacement: Replacement,
    *,
    targets: Tensor | None = None,
    max_logits: int = 10,
    probability: float = 0.95,
    max_latents: int = 8192,
    batch: int = 32,
    advance: Callable[[int], object] = lambda latents: None,
) -> Attribution:
    """Edges into the likeliest next tokens (at most `max_logits`, until they hold `probability`) or the `targets`
    (tokens), and into active latents: all or, if there are more than `max_latents`, those with the most influence on
    the logits through the targets visited so far. `advance` is told of latents visited."""
    at = Attributor(replacement)
    probabilities = replacement.logits_V.double().softmax(-1)
    logits = _likeliest(probabilities, max_logits, probability) if targets is None else targets.to(probabilities.device)
    count = min(max_latents, len(at.latents))
    columns = len(at.latents) + replacement.embedding_TD.shape[0] * (len(replacement.layers) + 1)
    edges_RC = _room(len(logits) + count, columns, len(at.latents), replacement.embedding_TD.dtype)
    all_constants = []
    for rows in torch.arange(len(logits)).split(batch):
        edges_RC[rows], constants = (z.cpu() for z in at.logit_rows(logits[rows]))
        all_constants.append(constants)
    visited = torch.empty(0, dtype=torch.long)
    weights = normalised(probabilities[logits]).cpu().to(edges_RC.dtype)
    everything = count == len(at.latents)
    while len(visited) < count:
        done = len(logits) + len(visited)
        if everything:
            chosen = torch.arange(count)
        else:
            influence = partial_influence(edges_RC[:done], visited, weights)[: len(at.latents)]
            influence[visited] = -1
            chosen = influence.topk(min(-(-count // ROUNDS), count - len(visited))).indices.sort().values
        for some in chosen.split(batch):
            edges_RC[done : done + len(some)], constants = (z.cpu() for z in at.latent_rows(some))
            all_constants.append(constants)
            done += len(some)
            advance(len(some))
        visited = torch.cat([visited, chosen])
    logit_values = _uncapped(replacement, at)[logits].cpu()
    return Attribution(
        latents=at.latents,
        layers=len(replacement.layers),
        positions=len(replacement.ids_T),
        logits=logits.cpu(),
        probabilities=probabilities[logits].cpu(),
        visited=visited,
        edges_RC=edges_RC,
        constants_R=torch.cat(all_constants),
        values_R=torch.cat([logit_values, at.latents.activation[visited].to(logit_values)]),
    )


def _likeliest(probabilities_V: Tensor, most: int, share: float) -> Tensor:
    values, tokens = probabilities_V.topk(min(most, len(probabilities_V)))
    return tokens[: int((values.cumsum(0) < share).sum()) + 1][:most]


@torch.no_grad()
def _uncapped(replacement: Replacement, at: Attributor) -> Tensor:
    """[V] the last position's logits less their mean, before a cap (Gemma-2) or scale is applied."""
    logits: Tensor = torch.nn.functional.linear(
        at.linear.final[-1], replacement.head.weight.to(at.embedding.dtype), getattr(replacement.head, "bias", None)
    )
    return logits - logits.mean()


def _room(rows: int, columns: int, latents: int, dtype: torch.dtype) -> Tensor:
    import psutil

    nodes = rows + columns - latents  # of the graph that is pruned, of which there are some copies
    needed = (rows * columns + 5 * nodes**2) * dtype.itemsize
    if needed > 0.8 * psutil.virtual_memory().available:
        raise UserError(
            f"{rows:,} targets and {columns:,} sources need {needed / 2**30:.1f} GiB: lower max_latents or shorten the "
            "prompt"
        )
    return torch.zeros(rows, columns, dtype=dtype)
