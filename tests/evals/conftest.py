from pathlib import Path
from typing import Any

import pytest
from skipcoder.pipeline import model as models
from skipcoder.pipeline.config import ModelConfig


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> Any:
    """The tiny Llama with its head."""
    return models.load_causal_lm(ModelConfig(name="tiny", id=str(tiny_model)), "cpu")
