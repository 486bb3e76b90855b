"""What README and docs show works: commands compose (and run: test_docs.py), Python runs."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import skipcoder.evals.circuit
import skipcoder.evals.evaluate
import skipcoder.evals.explore
import skipcoder.evals.interpret
import skipcoder.evals.scaling
import skipcoder.pipeline.cache
import skipcoder.trainer.export
import skipcoder.trainer.import_coder
import skipcoder.trainer.train  # noqa: F401 (importing an entry point registers its schema)
from skipcoder import registry
from skipcoder.cli import quoted
from skipcoder.errors import UserError
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.evals.config import EvaluateConfig, ExploreConfig, InterpretConfig, ScalingConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.tables.metrics import documented
from skipcoder.evals.tasks.registry import TASKS
from skipcoder.pipeline.config import CacheConfig, DataConfig
from skipcoder.pipeline.store.codecs import CODECS
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text.sources import SOURCES
from skipcoder.registry import Registry
from skipcoder.settings import flat, typed
from skipcoder.trainer.bank import bank
from skipcoder.trainer.coder.activations import ACTIVATIONS
from skipcoder.trainer.coder.coder import KINDS, SparseCoder, make_coder
from skipcoder.trainer.coder.readers import READERS
from skipcoder.trainer.config import CoderConfig, TrainConfig
from skipcoder.trainer.formats.config import ExportConfig, ImportConfig
from tests.conftest import REPO
from tests.documented import ENTRIES, PAGES, Command, commands
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.docs

README = (REPO / "README.md").read_text()
COMMANDS = [command for command in commands() if command.entry != "store_cli"]
NO_SETTINGS = {"key=value", "keep_error=True", "special_tokens=tokenizer.all_special_ids"}
_SETTING = r"`('?\+?[a-z][\w.]*=[^=`][^`]*)`"
SETTINGS = sorted({setting for page in PAGES.values() for setting in re.findall(_SETTING, page)} - NO_SETTINGS)
SCHEMAS = {
    "cache": CacheConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "interpret": InterpretConfig,
    "circuit": CircuitConfig,
    "explore": ExploreConfig,
    "scaling": ScalingConfig,
    "export": ExportConfig,
    "import_coder": ImportConfig,
}


def test_there_are_commands() -> None:
    assert {command.entry for command in COMMANDS} == set(SCHEMAS)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_compose(command: Command) -> None:
    """Every key, type and preset is known; of a sweep, the first job is taken."""
    words = [quoted(word) for word in command.words if word != "-m"]
    overrides = [word if "[" in word or "='" in word else word.split(",")[0] for word in words]
    cfg = composed(command.entry, overrides)
    del cfg.hydra
    assert typed(cfg, SCHEMAS[command.entry])


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_in_the_text_are_settings(setting: str) -> None:
    """Of one program at least."""
    errors = []
    for entry in SCHEMAS:
        try:
            composed(entry, [quoted(word) for word in shlex.split(setting)])
            return
        except HydraException as error:
            errors.append(str(error))
    raise AssertionError(errors)


def composed(entry: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cfg = compose(entry.removesuffix("_coder"), overrides, return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    return cfg


@pytest.mark.parametrize("entry", SCHEMAS)
def test_help_lists_every_setting_with_its_meaning(
    entry: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the presets of this program alone."""
    module = sys.modules[f"skipcoder.{ENTRIES[entry]}.{entry}"]
    monkeypatch.setattr(sys, "argv", [entry, "--help"])
    with pytest.raises(SystemExit) as end:
        module.cli_main()
    printed = capsys.readouterr().out
    assert not end.value.code
    plain = OmegaConf.to_container(OmegaConf.structured(SCHEMAS[entry]))
    assert isinstance(plain, dict)
    keyed: dict[str, Any] = plain  # type: ignore[assignment]
    for key in flat(keyed):
        if not key.startswith(("model.write_modules.", "ray.env")):
            assert re.search(rf"^  {re.escape(key)}=\S*\s+[A-Za-z0-9`\"]", printed, re.M), key
    assert ("\n  judge=" in printed) == (entry == "interpret") and ("\n  coder=" in printed) == (entry == "train")


def test_the_paper_page_says_what_was_measured() -> None:
    """Every line of its tables is printed from its JSON, whose verdicts follow from the seeds' differences."""
    page = (REPO / "docs" / "paper.md").read_text()
    script = [sys.executable, str(REPO / "benchmarks" / "paper.py"), str(REPO / "docs" / "paper.json")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    lines = {line for line in printed.splitlines() if line.startswith("|")}
    assert lines and lines == {line for line in page.splitlines() if line.startswith("|")}
    found = json.loads((REPO / "docs" / "paper.json").read_text())
    assert f"all {found['comparisons']} differences" in " ".join(page.split())
    for table in found["tables"]:
        for key in ("ce_clean", "ce_zero"):
            assert f"{table['facts'][key]:.3f}" in page
    for one in found["claims"]:
        for difference in one["differences"]:
            values = np.array(difference["by_seed"])
            student = float(scipy.stats.t.ppf(1 - 0.025 / found["comparisons"], len(values) - 1))
            assert difference["mean"] == pytest.approx(values.mean())
            assert difference["half"] == pytest.approx(student * values.std(ddof=1) / len(values) ** 0.5)
            clear = abs(difference["mean"]) > difference["half"]
            said = one["verdict"] if ";" not in one["verdict"] else one["verdict"].split(f"k {difference['k']}: ")[1]
            right = np.sign(difference["mean"]) == one["sign"]
            assert said.startswith("cannot be told" if not clear else "holds" if right else "does not hold")


def test_the_scaling_study_says_what_was_measured() -> None:
    """Every row of its table is a prediction of its JSON, and every law's error is in the text."""
    text = (REPO / "docs" / "studies" / "scaling.md").read_text()
    (found,) = json.loads((REPO / "docs" / "studies" / "scaling.json").read_text())
    assert found["formula"] in text
    for one in found["predictions"]:
        (low, high), off = one["ci"], 100 * (one["value"] / one["measured"] - 1)
        row = f"| {one['k']} | {one['value']:.4f} | {low:.4f} to {high:.4f} | {one['measured']:.4f} | {off:+.1f} % |"
        assert row in text and abs(off) < 5 and low < one["measured"] < high
    for off in found["off"].values():
        assert f"{100 * off:.1f} %" in text.replace("\n", " ")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    """mkdocs looks at those between the pages of docs/."""
    path = REPO / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


def test_python_example_runs(store: ActivationStore, tmp_path: Path) -> None:
    bank.train(config(store), tmp_path / "run")
    (code,) = re.findall(r"```python\n(.+?)```", README, re.S)
    code = code.replace("stores/smollm2.zarr", str(store.path)).replace("runs/skip", str(tmp_path / "run"))
    names: dict = {}
    exec(code.replace("layers.10.mlp", "layers.1.mlp"), names)
    assert names["y_hat"].shape == (1024, 24) and names["values"].shape == names["indices"].shape == (1024, 4)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_plain_zarr_example_runs(
    codec: str, store: ActivationStore, cache_config: Callable, capture_here: Callable, tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(.+?)```", (REPO / "docs" / "store.md").read_text(), re.S)
    if codec == "int8":
        store = capture_here(cache_config(tmp_path / "s.zarr", codec="int8"))
        code = re.sub(r"^parts = .+?^token", "token", code, flags=re.S | re.M)  # what is bf16's alone
    code = code.replace("stores/smollm2.zarr", str(store.path)).replace("layers.10.mlp", "layers.1.mlp")
    names: dict = {}
    exec(code.replace("unit = 0", "unit = 2"), names)
    begin, end = store.unit_range(2)
    expected = store.activations("layers.1.mlp", "input", begin, end).float().numpy()
    if codec == "bf16":
        x = names["x"]
    else:
        group, name, rows = names["store"], "layers.1.mlp/input", names["rows"]
        x = group[name][rows] * group[f"{name}_scale"][rows][:, None] * group[f"{name}_channel_scale"][2]
    np.testing.assert_allclose(x, expected, rtol=0 if codec == "bf16" else 2**-8)
    np.testing.assert_array_equal(np.sort(names["token"]), np.sort(store.tokens(2).ravel()))


def test_splicing_example_runs(store: ActivationStore, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bank.train(config(store), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(store.attrs["model"]["id"]).float().eval().requires_grad_(False)
    (code,) = re.findall(r"```python\n(.+?)```", (REPO / "docs" / "splicing.md").read_text(), re.S)
    names: dict = {
        "model": model,
        "coder": SparseCoder.load(tmp_path / "run"),
        "tokens": torch.from_numpy(store.tokens(0)[:1]).long(),
    }
    exec(code, names)
    assert not torch.equal(names["without"], names["logits"]) and names["attribution"].shape == names["values"].shape


@pytest.fixture
def tables() -> Iterator[None]:
    """What a test registers is gone after it."""
    every: tuple[Registry[Any], ...] = (SOURCES, CODECS, KINDS, ACTIVATIONS, READERS, TASKS)
    before = [dict(table) for table in every]
    yield
    for table, entries in zip(every, before, strict=True):
        table.clear()
        table.update(entries)


def test_extending_example_runs(
    cache_config: Callable, capture_here: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: None
) -> None:
    """Through the environment variable, from text to a trained, evaluated, reloaded coder; and the tests to inherit."""
    page = (REPO / "docs" / "extending.md").read_text()
    (code,), (tests,) = (re.findall(rf"```python{kind}\n(.+?)```", page, re.S) for kind in ("", " test"))
    (tmp_path / "my_extensions.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SKIPCODER_PLUGINS", "my_extensions")
    registry.load_plugins.cache_clear()
    cfg = cache_config(tmp_path / "s.zarr", codec="mine")
    cfg.data = DataConfig(kind="countdown", tokens=cfg.data.tokens, context=cfg.data.context)
    store = capture_here(cfg)
    train = config(store)
    train.coder = CoderConfig(kind="low_rank", activation="gated", k=4, width=64)
    train.loss.multi_topk, train.train.k_start = True, 8
    summary = bank.train(train, tmp_path / "run")
    coder = SparseCoder.load(tmp_path / "run")
    assert summary["train_fvu"] < 1 and type(coder).__name__ == "LowRank" and coder.B.abs().sum() > 0  # type: ignore
    assert coder.gain.std() > 0  # type: ignore[operator]  # it has learned
    evaluate(EvaluateConfig(run=str(tmp_path / "run"), tasks=["longest_row"]))
    row = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert row["longest_row"] == pytest.approx(float(coder.W_dec.norm(dim=1).max()))
    (tmp_path / "pickled").mkdir()
    torch.save(coder, tmp_path / "pickled" / "coder.pt")
    registry.load_plugins.cache_clear()
    assert torch.equal(SparseCoder.from_pretrained(str(tmp_path / "pickled")).W_enc, coder.W_enc)
    with pytest.raises(UserError, match=r"coder\.kind=nothing: choose from sae, .*low_rank"):
        make_coder(CoderConfig(kind="nothing"), 4, 4)
    (tmp_path / "test_mine.py").write_text(f"from my_extensions import *\n{tests}")
    inherited = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(inherited, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and "failed" not in done.stdout, done.stdout


def test_the_table_of_metrics_is_the_documented_one() -> None:
    assert documented() in (REPO / "docs" / "evaluation.md").read_text()
