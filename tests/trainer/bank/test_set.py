"""A set of coders: one for each hookpoint that a glob matches."""

import json
import shutil
from pathlib import Path

import pytest

import skipcoder
from skipcoder import CoderConfig, LoopConfig, OptimConfig, SparseCoder, SparseCoderSet, UserError
from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.pipeline.store.reader import ActivationStore
from tests.trainer.bank.test_sweep import call
from tests.trainer.run.test_run import assert_same

pytestmark = pytest.mark.slow
NAMES = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


@pytest.mark.cli
def test_a_glob_trains_each_hookpoint_as_if_alone(store: ActivationStore, tmp_path: Path) -> None:
    done = call(store, tmp_path, "hookpoint=layers.*.mlp", "coder=transcoder", "coder.k=2", "run.dir=set")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == NAMES
    assert all(f"set/{name}: transcoder k=2 training FVU" in done.stdout for name in NAMES)
    assert call(store, tmp_path, "coder=transcoder", "coder.k=2", "run.dir=alone").returncode == 0
    assert_same(tmp_path / "set" / "layers.1.mlp", tmp_path / "alone")
    many = call(store, tmp_path, "-m", "hookpoint=layers.*.mlp", "coder=transcoder", "coder.k=2,4", "hydra.sweep.dir=s")
    assert many.returncode == 0, many.stderr
    assert "bank 3 of 3: 2 coders on one stream" in many.stdout
    assert_same(tmp_path / "s" / "0" / "layers.1.mlp", tmp_path / "alone")


@pytest.mark.cli
def test_a_glob_that_matches_nothing_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    for way in (("run.dir=set",), ("-m", "hydra.sweep.dir=set")):
        done = call(store, tmp_path, *way, "hookpoint=layers.*.attn", "coder=transcoder", "coder.k=2")
        assert done.returncode == 2 and "hookpoint=layers.*.attn: " in done.stderr and "layers.2.mlp" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> SparseCoderSet:
    return skipcoder.train_set(
        store,
        CoderConfig(kind="transcoder", k=4, width=64),
        tmp_path_factory.mktemp("set"),
        "layers.*.mlp",
        train=LoopConfig(tokens=1280, batch_tokens=128),
        optim=OptimConfig(lr=1e-2),
    )


def test_load(trained: SparseCoderSet, tmp_path: Path) -> None:
    assert list(trained) == NAMES
    folder = trained[NAMES[0]].folder
    assert folder is not None
    assert repr(trained).startswith("<SparseCoderSet of 3: layers.0.mlp to layers.2.mlp; the first: transcoder, topk")
    shutil.copytree(folder, tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    with pytest.raises(UserError, match=r"are both of layers\.0\.mlp"):
        SparseCoderSet.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no folder with a coder"):
        SparseCoderSet.load(tmp_path / "empty")
    with pytest.raises(UserError, match="no such directory"):
        SparseCoderSet.load(tmp_path / "absent")
    other = SparseCoder.load(folder)
    other.meta = {**other.meta, "model": {**other.meta["model"], "fingerprint": "another"}}
    with pytest.raises(UserError, match="different models"):
        SparseCoderSet({**trained, NAMES[0]: other})


def test_a_set_of_one(store: ActivationStore, tmp_path: Path) -> None:
    loop, optim = LoopConfig(tokens=256, batch_tokens=128), OptimConfig(lr=1e-2)
    coder = CoderConfig(kind="transcoder", k=4, width=64)
    one = skipcoder.train_set(store, coder, tmp_path / "one", NAMES[1], train=loop, optim=optim)
    assert list(one) == [NAMES[1]] and one[NAMES[1]].folder == tmp_path / "one" / NAMES[1]
    with pytest.raises(UserError, match="is one coder, not a set"):
        SparseCoderSet.load(tmp_path / "one" / NAMES[1])


def test_evaluate_a_set(trained: SparseCoderSet) -> None:
    folder = trained[NAMES[0]].folder
    assert folder is not None
    rows = evaluate(EvaluateConfig(run=str(folder.parent), ce_tokens=64))
    assert [row["hookpoint"] for row in rows] == NAMES
    (together,) = json.loads((folder.parent / "set.together.json").read_text())
    assert together["hookpoints"] == NAMES
    assert together["fvu_by_hookpoint"] == [row["fvu"] for row in rows]
    assert {"ce_spliced", "kl_spliced", "ce_clean"} <= together.keys()
