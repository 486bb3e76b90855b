"""Configuration of `python evals/circuit.py`."""

from dataclasses import dataclass

from skipcoder.errors import UserError
from skipcoder.evals.config import at_least


@dataclass
class CircuitConfig:
    """Which latents of all layers make a model say what it says."""

    run: str = "???"
    """Folder of a set of coders: one run for each layer."""
    prompt: str | None = None
    """The text; what comes next is explained. One that holds `${` goes into a file (prompts)."""
    prompts: str | None = None
    """A file with one prompt in each line: a graph for each, and what recurs."""
    out: str | None = None
    """Folder for the graph and its page; null: RUN/circuits/ and the prompt's first words."""
    targets: list[str] | None = None
    """Next tokens to explain (`targets='[" Austin"]'`); null: the likeliest."""
    max_logits: int = 10
    """Next tokens at most."""
    probability: float = 0.95
    """Fewer next tokens, if they hold this probability."""
    max_latents: int = 8192
    """Latents whose inputs are followed at most: the most influential ones."""
    node_threshold: float = 0.8
    """Keep the nodes that hold this share of the influence on the next tokens."""
    edge_threshold: float = 0.98
    """Keep the edges between them that hold this share."""
    first_positions: int | None = None
    """Leave the MLPs at this many first tokens as they are; null: at as many as the coders' training left out."""
    keep_missing: bool = False
    """Leave the MLPs of layers without a coder as they are, instead of refusing the set."""
    contexts: int = 3
    """Texts shown for each latent, where it is largest in the store; 0: none, and the store is not read."""
    verify: int = 0
    """Switch off this many of the most influential latents, and as many others, in the model, and compare with what
    their edges predict."""
    scan: str | None = None
    """`scan` in circuit_tracer.json: the model's id on Neuronpedia or, where circuit-tracer's viewer is given
    features_dir, a name that begins with a slash; null: the store's name of the model."""
    batch: int = 32
    """Backward passes at once."""
    device: str | None = None
    """cuda, cuda:N or cpu; null: cuda if there is one, else cpu."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("set either prompt='TEXT' or prompts=FILE")
        if self.targets is not None and not self.targets:
            raise UserError("targets=[]: name some tokens, or leave it null for the likeliest")
        for name in ("probability", "node_threshold", "edge_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0, at most 1")
        at_least(self, 1, "max_logits", "max_latents", "batch")
        at_least(self, 0, "contexts", "verify", "first_positions")
