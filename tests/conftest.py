"""A tiny random Llama with a real tokenizer on disk, and stores captured from it without Ray."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Triton looks at it when it is imported, whoever does so first.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.environ.get("SKIPCODER_TEST_DEVICE") == "cuda" else "1")

import numpy as np
import pytest
import torch

from skipcoder.pipeline import cache
from skipcoder.pipeline.capture import job
from skipcoder.pipeline.capture.worker import Worker
from skipcoder.pipeline.config import CacheConfig, DataConfig, ModelConfig, RayConfig, SourceKind, StoreConfig
from skipcoder.pipeline.model.load import load_causal_lm
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.reader import ActivationStore

REPO = Path(__file__).resolve().parent.parent
D_MODEL, LAYERS, CONTEXT, UNIT_ROWS, UNITS = 24, 3, 16, 4, 33


LONG = ("test_real_model.py", "test_faults.py")
"""Files that take minutes: begun first, so that no process is left with one of them when the other is done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the files."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter replaces all of triton.language whenever a kernel calls a function, which takes half of its
    time. Once is enough for what stays replaced (`core`), and the kernel's own start has replaced the rest."""
    try:
        from triton.language import core
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return (yield)
    whole, done = InterpretedFunction.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        sees_core = any(value is core for value in self.fn.__globals__.values())
        if sees_core and "core" not in done:
            done.add("core")
            return whole(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(scope="session")
def text_file() -> Path:
    """Some real text, many short documents: paragraphs of this project's own sources as they once were (JSON lines)."""
    return REPO / "tests" / "text.jsonl"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Directory of a 3-layer random Llama and a byte-level tokenizer that puts BOS first."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"), text_file, LAYERS)


def make_tiny_model(directory: Path, text_file: Path, layers: int) -> Path:
    """A random Llama in the directory, with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(text_file)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    lm: Any = LlamaForCausalLM(config)
    lm.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def cache_config(tiny_model: Path, text_file: Path) -> Callable[..., CacheConfig]:
    """make(path, hookpoints=..., rows=..., **StoreConfig fields) -> CacheConfig for the tiny model."""

    def make(
        path: Path, hookpoints: tuple[str, ...] = ("layers.1.mlp",), rows: int = UNITS * UNIT_ROWS, **store: Any
    ) -> CacheConfig:
        return CacheConfig(
            model=ModelConfig(name="tiny", id=str(tiny_model)),
            data=DataConfig(kind=SourceKind.jsonl, path=str(text_file), tokens=rows * CONTEXT, context=CONTEXT),
            store=StoreConfig(**{"path": str(path), "unit_rows": UNIT_ROWS, **store}),
            hookpoints=list(hookpoints),
            micro_batch_tokens=2 * CONTEXT,
        )

    return make


@pytest.fixture(scope="session")
def capture_here() -> Callable[[CacheConfig], ActivationStore]:
    """Capture in this process: all of `cache.capture` but Ray."""

    def run_units(store: Place, attrs: dict, units: list[int], model: ModelConfig, cfg: RayConfig) -> None:
        worker = Worker(store.address, model, torch.get_num_threads(), "cpu")
        worker({"item": np.array(units)})

    def run(cfg: CacheConfig) -> ActivationStore:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "run", run_units)
            cache.capture(cfg)
        return ActivationStore.open(cfg.store.path)

    return run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, cache_config: Any, capture_here: Any) -> ActivationStore:
    """A finished store of two hookpoints; 33 units, so two are held out. Read only."""
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    return capture_here(cache_config(path, ("layers.*.mlp",)))


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> Any:
    """The tiny Llama with its head."""
    return load_causal_lm(ModelConfig(name="tiny", id=str(tiny_model)), "cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield running
        running.close()
