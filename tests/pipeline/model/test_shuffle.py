"""The control model: weights permuted by name."""

from pathlib import Path
from typing import Any

import torch

from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.model.hookpoints import Hookpoint


def trunk(cfg: ModelConfig) -> Any:
    return model.load_causal_lm(cfg, "cpu").base_model


def test_weights_are_permuted_alike_in_part_and_whole(tiny_model: Path) -> None:
    """The capture loads some layers without the head, the evaluation all of them."""
    plain = ModelConfig(name="tiny", id=str(tiny_model))
    shuffled = ModelConfig(name="tiny", id=str(tiny_model), shuffle=3)
    whole = trunk(shuffled).state_dict()
    part = model.load_trunk(shuffled, [Hookpoint("h", "layers.1.mlp", "layers.1.mlp")], "cpu").state_dict()
    original = trunk(plain).state_dict()
    assert len(part) < len(whole)
    for name, weight in part.items():
        assert torch.equal(weight, whole[name])
        assert torch.equal(weight.flatten().sort().values, original[name].flatten().sort().values)
        assert torch.equal(weight, original[name]) == (weight.ndim < 2)
    other = ModelConfig(name="tiny", id=str(tiny_model), shuffle=4)
    assert not torch.equal(trunk(other).embed_tokens.weight, whole["embed_tokens.weight"])
    assert model.identity(plain) != model.identity(shuffled) != model.identity(other)
    assert "shuffle" not in model.identity(plain)  # stores that were captured before stay what they are
