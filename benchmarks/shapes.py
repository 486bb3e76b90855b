"""The shapes at which kernels are compiled, counted and timed: MLP widths of real models, with dictionary sizes and k
that have been trained on them (Llama-3.2-1B: EleutherAI/skip-transcoder-Llama-3.2-1B-131k; Gemma-2-2B: Gemma Scope)."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One training step."""

    n: int
    """Tokens."""
    d: int
    """Width of the MLP's input and output."""
    m: int
    """Latents."""
    k: int


SHAPES = {
    "SmolLM2-135M": Shape(8192, 576, 18432, 32),
    "Pythia-160M": Shape(8192, 768, 32768, 32),
    "Llama-3.2-1B": Shape(8192, 2048, 131072, 32),
    "Gemma-2-2B": Shape(8192, 2304, 16384, 64),
    "Gemma-2-2B, 65k": Shape(8192, 2304, 65536, 64),
    "Llama-8B": Shape(4096, 4096, 131072, 64),
}
TINY = {"tiny": Shape(64, 48, 512, 4)}
