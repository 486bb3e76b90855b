"""Exports and imports as users make them: from runs, by the entry points, and over a stand-in for the Hub."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig, ExamplesConfig, InterpretConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.evals.interpret import interpret
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import MLP_KINDS, Kind, RunConfig, Side, StoreRef
from skipcoder.trainer.formats import plain, sparsify
from skipcoder.trainer.formats.config import ExportConfig, ImportConfig, Target, TopK
from skipcoder.trainer.formats.fit import Sample, fit
from skipcoder.trainer.formats.importing import import_coder
from skipcoder.trainer.run.run import Run
from tests.conftest import REPO
from tests.evals.export.conftest import export
from tests.trainer.coders import random_coder
from tests.trainer.formats import hub_server
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("format", [Target.plain, Target.sparsify])
def test_export_then_import_gives_the_same_bytes(
    format: Target, runs: dict[Any, Path], store: ActivationStore, tmp_path: Path
) -> None:
    for kind in MLP_KINDS:
        out = export([runs[kind]], format, tmp_path / kind.value)
        import_coder(
            ImportConfig(source=str(out), store=StoreRef(str(store.path)), hookpoint="layers.1.mlp",
                         run=RunConfig(str(tmp_path / f"{kind}-run")))
        )  # fmt: skip
        assert not any(str(store.attrs["model"]["id"]).encode() in file.read_bytes() for file in out.glob("*.*"))
        ours, again = SparseCoder.load(runs[kind]), SparseCoder.load(tmp_path / f"{kind}-run")
        assert {n: t.numpy().tobytes() for n, t in ours.state_dict().items()} == {
            n: t.numpy().tobytes() for n, t in again.state_dict().items()
        }
        assert again.cfg.k == ours.cfg.k and again.meta["write"] == ours.meta["write"]


def test_an_imported_coder_is_evaluated_and_interpreted_as_any_other(
    runs: dict[Any, Path], store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = export([runs[Kind.skip_transcoder]], Target.sparsify, tmp_path / "s")
    import_coder(
        ImportConfig(source=str(out), store=StoreRef(str(store.path)), hookpoint="layers.1.mlp",
                     run=RunConfig(str(tmp_path / "run")))
    )  # fmt: skip
    lines = capsys.readouterr().out
    assert "subtract_decoder_bias=False" in lines and "subtract_decoder_bias=True" in lines
    table = tmp_path / "table.json"
    evaluate(EvaluateConfig(runs=str(tmp_path / "run"), out=str(table), intervals=False, ce_tokens=64))
    (row,) = json.loads(table.read_text())
    wanted = json.loads((runs[Kind.skip_transcoder] / "evaluation.json").read_text())
    assert row["fvu"] == wanted["fvu"] and row["ce_spliced"] == wanted["ce_spliced"]
    assert "Training curves" not in (tmp_path / "report.html").read_text()  # it has none
    interpret(InterpretConfig(run=str(tmp_path / "run"), examples=ExamplesConfig(window=8, train=4, test=5)))
    assert (tmp_path / "run" / "features" / "index.html").exists()
    with pytest.raises(UserError, match="is not empty"):
        import_coder(
            ImportConfig(source=str(out), store=StoreRef(str(store.path)), run=RunConfig(str(tmp_path / "run")))
        )


def test_import_finds_out_what_files_do_not_say(
    runs: dict[Any, Path], store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A transcoder from before February 2025, and an SAE of the MLP's input."""
    coder = SparseCoder.load(runs[Kind.transcoder])
    coder.b_enc.add_(coder.W_enc @ coder.b_dec)  # so that W_enc (x - b_dec) + b_enc is what it was
    sparsify.write(coder, tmp_path / "old")
    where: Any = {"store": StoreRef(str(store.path)), "hookpoint": "layers.1.mlp"}
    summary = import_coder(ImportConfig(source=str(tmp_path / "old"), run=RunConfig(str(tmp_path / "a")), **where))
    fvu = fit(
        SparseCoder.load(runs[Kind.transcoder]),
        Sample.of(store, "layers.1.mlp", Run.open(runs[Kind.transcoder]).filter), "input", "output",
    )["fvu"]  # fmt: skip
    assert summary["validation_fvu"] == pytest.approx(fvu, rel=1e-4)
    cfg = config(store, Kind.sae)
    cfg.coder.side = Side.input
    bank.train(cfg, tmp_path / "input")
    sparsify.write(SparseCoder.load(tmp_path / "input"), tmp_path / "sae")
    summary = import_coder(ImportConfig(source=str(tmp_path / "sae"), run=RunConfig(str(tmp_path / "b")), **where))
    assert summary["side"] == "input" and Run.open(tmp_path / "b").read_site.side == "input"
    plain.write(random_coder(Kind.transcoder, d=12), tmp_path / "other")
    with pytest.raises(UserError, match=r"leads from 12 to 12 dimensions, but layers\.1\.mlp .* has 24 and 24"):
        import_coder(ImportConfig(source=str(tmp_path / "other"), run=RunConfig(str(tmp_path / "c")), **where))
    sparsify.write(random_coder(Kind.transcoder), tmp_path / "torn")
    (tmp_path / "torn" / "cfg.json").write_text("{")
    with pytest.raises(UserError, match=r"cfg\.json cannot be read"):
        import_coder(ImportConfig(source=str(tmp_path / "torn"), run=RunConfig(str(tmp_path / "c")), **where))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        import_coder(ImportConfig(source=str(tmp_path / "old"), run=RunConfig(str(tmp_path / "file")), **where))
    plain.write(random_coder(Kind.transcoder), tmp_path / "noise")
    capsys.readouterr()
    import_coder(ImportConfig(source=str(tmp_path / "noise"), run=RunConfig(str(tmp_path / "c")), **where))
    assert "no better than the mean" in capsys.readouterr().out


def test_saelens_top_k_transcoders_need_a_decision(runs: dict[Any, Path], tmp_path: Path) -> None:
    run = runs[Kind.skip_transcoder]
    with pytest.raises(UserError, match="topk=exact writes one for the classes"):
        export([run], Target.saelens, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    exact = json.loads((export([run], Target.saelens, tmp_path / "x", topk=TopK.exact) / "cfg.json").read_text())
    assert exact["architecture"] == "topk_skip_transcoder" and exact["k"] == 4
    out = export([run], Target.saelens, tmp_path / "y", topk=TopK.thresholds)
    cfg = json.loads((out / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu_skip_transcoder"
    held_out = json.loads((run / "summary.json").read_text())["validation_fvu"]
    facts = cfg["metadata"]
    assert facts["l0_topk"] == 4 and abs(facts["l0_threshold"] - 4) < 1
    assert facts["fvu_topk"] == pytest.approx(held_out, rel=1e-5) and facts["fvu_threshold"] != facts["fvu_topk"]
    assert "not the coder that was trained" in (out / "README.md").read_text()


def test_what_cannot_be_exported(runs: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not empty"):
        export([runs[Kind.sae]], Target.plain, tmp_path / "full")
    with pytest.raises(UserError, match="several coders of one hookpoint"):
        export([runs[Kind.sae], runs[Kind.transcoder]], Target.plain, tmp_path / "out")
    with pytest.raises(UserError, match="set run=DIR, or runs=GLOB"):
        ExportConfig(out="x")
    # A writer that spoils a weight is found out, and nothing stays.
    write = sparsify.write

    def spoiling(coder: SparseCoder, folder: Path) -> None:
        coder.b_dec[0] += 1
        write(coder, folder)
        coder.b_dec[0] -= 1

    (tmp_path / "out.partial").mkdir()  # of someone else
    monkeypatch.setattr(sparsify, "write", spoiling)
    with pytest.raises(RuntimeError, match="it is not the run's coder"):
        export([runs[Kind.sae]], Target.sparsify, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "out.partial"}


def test_several_runs_lie_side_by_side(runs: dict[Any, Path], tmp_path: Path) -> None:
    out = export([runs[0], runs[2]], Target.sparsify, tmp_path / "many")
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"layers.0.mlp", "layers.2.mlp"}
    assert (out / "README.md").read_text().count("\n## layers.") == 2


@pytest.mark.cli
def test_entry_points(runs: dict[Any, Path], store: ActivationStore, tmp_path: Path) -> None:
    def command(script: str, *args: str) -> subprocess.CompletedProcess:
        run = [sys.executable, str(REPO / "trainer" / script), *args]
        return subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)

    done = command("export.py", f"run={runs[Kind.transcoder]}", "format=sparsify", "out=s", "license=apache-2.0")
    assert done.returncode == 0 and "s: sparsify, 1 coder; s/README.md says how to read it" in done.stdout, done.stderr
    done = command("import_coder.py", "source=s", f"store.path={store.path}", "hookpoint=layers.1.mlp", "run.dir=r")
    assert done.returncode == 0 and "r: transcoder k=4 width=64" in done.stdout, done.stderr
    done = command("export.py", f"run={runs[Kind.transcoder]}", "format=saelens", "out=t")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"s", "r"}  # no stray files


@pytest.mark.cli
def test_hub(runs: dict[Any, Path], tmp_path: Path) -> None:
    """In processes of their own: huggingface_hub reads its settings when it is imported."""

    def python(code: str, **environment: str) -> subprocess.CompletedProcess:
        env = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), **environment}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)

    run = runs[Kind.skip_transcoder]
    load = (
        "import torch, skipcoder; c = skipcoder.SparseCoder.from_pretrained('me/coder');"
        f"d = skipcoder.SparseCoder.load({str(run)!r});"
        "print(all(torch.equal(a, b) for a, b in zip(c.parameters(), d.parameters())), c.meta['seed'] == 0)"
    )
    with hub_server.serving() as hub:
        online = {"HF_ENDPOINT": hub.url}
        push = f"import skipcoder; print(skipcoder.push_to_hub({str(run)!r}, 'me/coder', private=True, license='mit'))"
        done = python(push, **online)
        assert done.returncode != 0 and "hf auth login" in done.stderr.splitlines()[-1]
        done = python(push, HF_TOKEN=hub_server.TOKEN, **online)
        assert done.returncode == 0 and done.stdout.startswith(f"{hub.url}/me/coder/commit/"), done.stderr
        files = hub.repos["me/coder"]
        assert set(files) == {"README.md", "coder.json", "coder.safetensors", "layers.1.mlp.png"}
        assert hub.private["me/coder"]
        card = files["README.md"].decode()
        front = yaml.safe_load(card.split("---")[1])
        assert front["license"] == "mit" and front["library_name"] == "skipcoder"
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert f"| FVU | {evaluation['fvu']:.4g} " in card and "adam" in card and "layers.1.mlp.png" in card
        done = python(load, **online)
        assert done.stdout.split() == ["True", "True"], done.stderr
        code = (
            f"import sys; sys.argv[1:] = ['out=e', 'push=me/again', 'run={run}'];"
            "from skipcoder.trainer.export import cli_main; cli_main()"
        )
        done = python(code, HF_TOKEN=hub_server.TOKEN, **online)
        assert done.returncode == 0 and "pushed: " in done.stdout and "coder.json" in hub.repos["me/again"], done.stderr
        again = code.replace("out=e", "out=f")
        done = python(again, **online)  # without a token: what was exported stays, and the remedy is said
        assert (
            done.returncode == 2 and "hf upload me/again f" in done.stderr and (tmp_path / "f" / "coder.json").exists()
        )
        done = python(load.replace("me/coder", "me/nothing"), **online)
        assert "no such repository on the Hub, or it is private" in done.stderr.splitlines()[-1]
    # What was downloaded is found again without a network; what was not is a clear error.
    assert python(load, HF_HUB_OFFLINE="1").stdout.split() == ["True", "True"]
    done = python(load.replace("me/coder", "me/again"), HF_HUB_OFFLINE="1")
    assert "me/again: the Hugging Face Hub cannot be reached" in done.stderr.splitlines()[-1]
    done = python(load.replace("me/coder", "./nothing"))
    assert "./nothing: no such directory, and no ORG/NAME" in done.stderr.splitlines()[-1]
    assert torch.is_tensor(SparseCoder.from_pretrained(str(run / "checkpoint")).W_enc)
