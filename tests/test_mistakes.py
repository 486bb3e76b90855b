"""What a new user typed or met, and what they should see: one message that names the key or file and the remedy."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import skipcoder
from skipcoder.errors import UserError
from skipcoder.evals import evaluate
from skipcoder.evals.config import EvaluateConfig
from skipcoder.pipeline import cache
from skipcoder.pipeline.config import CacheConfig, ModelConfig
from skipcoder.pipeline.model.load import load_causal_lm, load_tokenizer
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer import train
from skipcoder.trainer.bank import bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, OptimConfig
from skipcoder.trainer.run.run import Run
from tests.conftest import REPO
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    directory = tmp_path_factory.mktemp("runs") / "0"
    bank.train(config(store, tokens=1280), directory)
    return directory


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """typed(program, words...): the one message that the program ends with, exit code 2."""

    def call(program: Any, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [program.__name__, *words])
        with pytest.raises(SystemExit) as end:
            program.cli_main()
        message = capfd.readouterr().err
        assert end.value.code == 2 and "Traceback" not in message, message
        assert message.count("error: ") == 1, message
        return message

    return call


def small(store: ActivationStore, *words: str) -> list[str]:
    return [f"store.path={store.path}", "hookpoint=layers.1.mlp", "coder.k=4", "coder.width=64", "train.tokens=1280",
            "train.batch_tokens=128", *words]  # fmt: skip


def test_a_finished_run_without_its_coder(run: Path, store: ActivationStore, tmp_path: Path) -> None:
    gone = Path(shutil.copytree(run, tmp_path / "gone"))
    (gone / "checkpoint" / "coder.safetensors").unlink()
    for look in (lambda: bank.train(config(store, tokens=1280), gone), lambda: Run.open(gone)):
        with pytest.raises(UserError, match=r"gone is finished, but its coder is gone.*delete .*gone"):
            look()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_places_that_cannot_be_written(
    run: Path, store: ActivationStore, tiny_model: Path, tmp_path: Path, typed: Callable[..., str], place: str
) -> None:
    (tmp_path / "file").write_text("")
    at = tmp_path / place
    named = str(tmp_path / "file") if "file" in place else place
    words = [f"model.id={tiny_model}", "model.name=x", "model.gguf_file=null", "data.tokens=4096", "data.context=16"]
    assert named in typed(train, *small(store, f"run.dir={at}"))
    assert named in typed(evaluate, f"runs={run}", f"out={at / 'x.json'}", "ce_tokens=10000000000")  # before any work
    assert named in typed(cache, *words, f"store.path={at / 'x.zarr'}")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=nan", "optim.lr=nan"),
        ("coder.width=999999999", "coder.width=999999999: "),
        ("optim.lr=inf", "optim.lr=inf"),
    ],
)
def test_numbers_that_cannot_be(
    store: ActivationStore, tmp_path: Path, typed: Callable[..., str], word: str, message: str
) -> None:
    assert message in typed(train, *small(store, word, f"run.dir={tmp_path / 'run'}"))


def test_a_broken_config(run: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    (broken / "config.yaml").write_text("coder: [")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        Run.open(broken)


def test_a_truncated_model(tiny_model: Path, tmp_path: Path, store: ActivationStore) -> None:
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="broken"):
        load_causal_lm(ModelConfig(name="tiny", id=str(broken)), "cpu")


def test_help_into_head() -> None:
    """The reader goes away before all is written."""
    command = f"{sys.executable} {REPO}/trainer/train.py --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert not done.stderr


def test_rows_past_the_end(store: ActivationStore) -> None:
    stored = store.rows * store.context
    for start, stop in ((stored - 1, stored + 1), (-1, 2), (5, 4)):
        with pytest.raises(UserError, match=f"holds {stored:,} tokens"):
            store.activations("layers.1.mlp", "input", start, stop)


def test_a_model_folder_without_tokenizer(
    tiny_model: Path, tmp_path: Path, cache_config: Callable[..., CacheConfig]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, bare)
    cfg = cache_config(tmp_path / "x.zarr")
    cfg.model.id = str(bare)
    with pytest.raises(UserError, match="tokenizer"):
        cache.capture(cfg)
    (bare / "config.json").write_text('{"model_type": "gpt2"}')  # for which transformers makes an empty tokenizer
    with pytest.raises(UserError, match="no tokenizer is there"):
        load_tokenizer(cfg.model)


def test_a_coder_of_another_hookpoint(lm: Any, run: Path, store: ActivationStore) -> None:
    coder = SparseCoder.load(run)
    with pytest.warns(UserWarning, match=r"trained on layers\.1\.mlp"), skipcoder.splice(lm, {"layers.0.mlp": coder}):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with skipcoder.splice(lm, {"layers.1.mlp": coder}):
            pass
        with skipcoder.splice(lm, {"model.layers.1.mlp": coder}) as spliced:  # as the model itself names it
            lm(torch.ones(1, 4, dtype=torch.long))
            assert spliced["model.layers.1.mlp"].values.shape == (1, 4, 4)


def test_training_that_ran_away_is_named(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(store, tokens=1280)
    cfg.optim = OptimConfig(lr=1e6)
    bank.train(cfg, tmp_path / "run")
    assert "lower optim.lr" in capsys.readouterr().out


def test_one_hookpoint_for_a_list(typed: Callable[..., str], tmp_path: Path) -> None:
    message = typed(cache, "hookpoints=layers.1.mlp", f"store.path={tmp_path / 'x.zarr'}")
    assert "hookpoints takes a list, hookpoints='[A]'" in message


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_dropped_connection_leaves_a_checkpoint(store: ActivationStore, tmp_path: Path, number: int) -> None:
    cfg = config(store, tokens=128 * 4000, save_every=100_000, log_every=1)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def hang_up() -> None:
        while not (metrics.exists() and metrics.stat().st_size):
            pass
        os.kill(os.getpid(), number)

    threading.Thread(target=hang_up).start()
    with pytest.raises(KeyboardInterrupt):
        bank.train(cfg, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint" / "state" / "state.pt").exists()


def test_unfinished_runs_do_not_keep_others_from_evaluation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0", "1"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "1" / "summary.json").unlink()
    evaluate.evaluate(EvaluateConfig(runs=f"{tmp_path}/*", ce_tokens=32))
    said = capsys.readouterr().out
    assert "1 is no finished run" in said and (tmp_path / "0" / "evaluation.json").exists()
    with pytest.raises(UserError, match="no finished run"):
        evaluate.evaluate(EvaluateConfig(runs=f"{tmp_path}/1", ce_tokens=32))


def test_a_capture_too_small_to_train_on(
    cache_config: Callable[..., CacheConfig], capture_here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The capture says so itself."""
    small_store = capture_here(cache_config(tmp_path / "small.zarr", rows=8))
    assert "too few" in capsys.readouterr().out
    cfg = config(small_store, tokens=1280)
    cfg.coder = CoderConfig(kind="transcoder", k=4, width=64)
    with pytest.raises(UserError, match=r"data\.tokens"):
        bank.train(cfg, tmp_path / "run")
