"""Processes that hold some of a coder's latents each learn what one process learns that holds all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.files import part_name, read_coder
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind, LoopConfig, OptimConfig, OptimName, TrainConfig
from skipcoder.trainer.data.ranks import Ranks
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import check
from skipcoder.trainer.run.checkpoint import load_state, save_state
from skipcoder.trainer.run.run import Run
from tests.conftest import REPO
from tests.trainer.step.shards_case import CASES, K, M

pytestmark = [pytest.mark.slow, pytest.mark.cli]

MESHES = {"2 shards": (2, 2), "4 shards": (4, 4), "2 x 2": (4, 2)}
"""Processes, and shards."""


def launch(processes: int, *command: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    started = [sys.executable, *(torchrun if processes > 1 else []), *command]
    return subprocess.Popen(started, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen[str]) -> str:
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module", params=["float64", "float32"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each process of each mesh learned, in one dtype."""
    found = {}
    for name, (processes, shards) in {"1": (1, 1), **MESHES}.items():
        out = tmp_path_factory.mktemp("shards")
        finish(launch(processes, "-m", "tests.trainer.step.shards_case", str(out), str(shards), request.param))
        found[name] = [torch.load(out / f"{rank}.pt") for rank in range(processes)]
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_shards_learn_what_one_process_learns(outcomes: dict[str, list[Any]], mesh: str) -> None:
    """Every kind, activation, loss and search, over six steps. The sums are the same in another order, of N K = 384
    terms and less, each off by half a unit in the last place; Adam magnifies that where gradients are tiny."""
    (one,) = outcomes["1"]
    assert len(one["learned"]) >= len(CASES) - 2
    for name, (lines, all_state) in one["learned"].items():
        state = {key: tensor for key, tensor in all_state.items() if key != "since_fired"}
        eps = torch.finfo(state["W_enc"].dtype).eps
        for process in outcomes[mesh]:
            lines_2, state_2 = process["learned"][name]
            for line, line_2 in zip(lines, lines_2, strict=True):
                assert (line["l0"], line["dead"]) == (line_2["l0"], line_2["dead"]), name
                for key in line:  # the penalty is the square of a small difference
                    assert line_2[key] == pytest.approx(line[key], rel=2000 * eps, abs=100 * eps), (name, key)
            assert torch.equal(all_state["since_fired"], state_2["since_fired"]), name
            for key in state:
                assert (state[key] - state_2[key]).norm() <= 10_000 * eps * state[key].norm(), (name, key)


@pytest.mark.parametrize("mesh", MESHES)
def test_processes_of_one_mesh_agree_to_the_bit(outcomes: dict[str, list[Any]], mesh: str) -> None:
    """Also in what each of them moves for itself, b_dec and W_skip."""
    first, *others = outcomes[mesh]
    for other in others:
        for name, (lines, state) in first["learned"].items():
            assert lines == other["learned"][name][0]
            assert all(torch.equal(state[key], other["learned"][name][1][key]) for key in state), name


@pytest.mark.parametrize("mesh", MESHES)
def test_micro_batches_in_turns_give_what_they_give_one_by_one(outcomes: dict[str, list[Any]], mesh: str) -> None:
    for process in outcomes[mesh]:
        (lines, state), (lines_2, state_2) = process["learned"]["micro-batches"], process["one by one"]
        assert lines == lines_2 and all(torch.equal(state[key], state_2[key]) for key in state)


@pytest.mark.parametrize("mesh", MESHES)
def test_of_equal_latents_the_same_are_chosen(outcomes: dict[str, list[Any]], mesh: str) -> None:
    (one,) = outcomes["1"]
    for process in outcomes[mesh]:
        for way, dense in one["chosen"].items():
            assert torch.equal(dense, process["chosen"][way]), way
    assert len(one["chosen"]["topk"].unique()) < 12  # there are equals


def train(store: ActivationStore, directory: Path, processes: int, shards: int, *more: str) -> subprocess.Popen[str]:
    return launch(
        processes, str(REPO / "trainer" / "train.py"), f"store.path={store.path}", "hookpoint=layers.1.mlp",
        "coder=skip_transcoder", "coder.k=4", "coder.width=64", "optim.lr=1e-3", "train.tokens=5120",
        "train.batch_tokens=128", "train.threads=1", "train.log_every=5", "train.save_every=5", "loss.auxk=0.03125",
        "train.dead_tokens=500", "encode.mode=float32", f"train.shards={shards}", f"run.dir={directory}", *more,
    )  # fmt: skip


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return SparseCoder.load(directory).state_dict()


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def kill_one_process(run: subprocess.Popen[str], directory: Path, after: int) -> None:
    """kill -9 one of torchrun's processes once some steps are saved."""
    deadline = time.time() + 120
    index = directory / "checkpoint" / "state" / "state.json"
    while time.time() < deadline and not (index.is_file() and f"state-{after}-" in index.read_text()):
        assert run.poll() is None, run.communicate()[0][-3000:]
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert run.wait(timeout=120) != 0
    assert not (directory / "summary.json").exists()


def test_a_run_is_killed_and_goes_on_in_another_number_of_processes(store: ActivationStore, tmp_path: Path) -> None:
    """From two shards to four, to two rows of two, to one process that holds all."""
    finish(train(store, tmp_path / "one", 1, 1))
    directory, slow = tmp_path / "moved", "train.save_every=1"  # each save takes longer than a step
    for (processes, shards), saved in (((2, 2), 5), ((4, 4), 15), ((4, 2), 25)):
        kill_one_process(train(store, directory, processes, shards, slow), directory, saved)
        state = load_state(directory)
        assert state is not None and state["learner"]["step"] >= saved
        assert state["learner"]["coder"]["W_enc"].shape == (64, 24)
        held = load_state(directory, range(16, 32))
        assert held is not None
        for name, moments in held["learner"]["optimiser"][0]["state"].items():
            whole = state["learner"]["optimiser"][0]["state"][name]["exp_avg"]
            assert torch.equal(moments["exp_avg"], whole[16:32] if len(whole) == 64 else whole)
    assert "going on from step" in finish(train(store, directory, 1, 1))
    assert [path.name for path in (directory / "checkpoint" / "state").iterdir()] == ["state.pt"]
    for line, line_2 in zip(metrics(tmp_path / "one"), metrics(directory), strict=True):
        assert (line["step"], line["dead"]) == (line_2["step"], line_2["dead"])
        assert line_2["fvu"] == pytest.approx(line["fvu"], rel=1e-4)
    for (name, one), two in zip(weights(tmp_path / "one").items(), weights(directory).values(), strict=True):
        assert (one - two).norm() <= 1e-3 * one.norm(), name


def test_an_interrupted_run_resumes_to_the_bit(store: ActivationStore, tmp_path: Path) -> None:
    finish(train(store, tmp_path / "whole", 2, 2))
    kill_one_process(train(store, tmp_path / "killed", 2, 2), tmp_path / "killed", 10)
    finish(train(store, tmp_path / "killed", 2, 2))
    for one, two in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "killed").values(), strict=True):
        assert torch.equal(one, two)

    folder = tmp_path / "whole" / "checkpoint"
    names = {path.name for path in folder.iterdir()}
    assert names == {"coder.json", "coder.safetensors.index.json", part_name(0, 2), part_name(1, 2), "state"}
    run = Run.open(tmp_path / "whole")
    assert run.coder.W_enc.shape == (64, 24) and run.coder.W_skip is not None
    assert run.weights == Run.open(tmp_path / "killed").weights
    other = read_coder(tmp_path / "killed")
    assert other.description["width"] == 64

    batch = next(iter(ActivationStream(store, "layers.1.mlp", 4096, split="validation", epochs=1, filter=run.filter)))
    error = batch.y.double() - run.coder(batch.x).y_hat.double()
    fvu = error.square().sum() / (batch.y.double() - batch.y.double().mean(0)).square().sum()
    assert float(fvu) == pytest.approx(metrics(tmp_path / "whole")[-1]["validation_fvu"], rel=1e-5)

    assert torch.equal(SparseCoder.from_pretrained(str(folder)).W_enc, run.coder.W_enc)
    (folder / part_name(1, 2)).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"coder-00002-of-00002.safetensors is damaged"):
        SparseCoder.load(tmp_path / "whole")


def test_of_two_saves_the_later_counts_and_half_a_cleanup_harms_nothing(tmp_path: Path) -> None:
    """A run goes from shards to one process and back, and is killed between a save and the removal of the last one."""

    def state(step: int, latents: int) -> Any:
        rows = torch.full((latents, 3), float(step))
        of: Any = {"coder": {"W_enc": rows}, "optimiser": [], "since_fired": rows[:, 0], "density": rows[:, 0]}
        learner = of | {"encode_mode": "float32", "recall": 1.0, "step": step, "tokens": step}
        position = {"epoch": 0, "block": 0, "offset": 0, "layout": ""}
        return {"learner": learner, "stream": position, "window": [], "seconds": 0.0}

    folder = tmp_path / "checkpoint" / "state"
    folder.mkdir(parents=True)

    def write_parts(step: int) -> None:
        parts = [{"file": f"state-{step}-{r}-of-2.pt", "first": 4 * r, "end": 4 * r + 4} for r in range(2)]
        for part in parts:
            torch.save(state(step, 4), folder / str(part["file"]))
        (folder / "state.json").write_text(json.dumps({"step": step, "parts": parts}))

    def loaded() -> int:
        found = load_state(tmp_path)
        assert found is not None and found["learner"]["coder"]["W_enc"].shape == (8, 3)
        return found["learner"]["step"]

    write_parts(10)
    assert loaded() == 10
    torch.save(state(15, 8), folder / "state.pt")
    assert loaded() == 15  # killed before the parts were removed
    (folder / "state-10-1-of-2.pt").unlink()
    assert loaded() == 15  # ... or in between
    write_parts(20)
    assert loaded() == 20  # killed before the one file was removed
    save_state(state(25, 8), range(8), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["state.pt"] and loaded() == 25


def config(**keys: Any) -> TrainConfig:
    coder = {"kind": Kind.transcoder, "k": K, "width": M, **{k: v for k, v in keys.items() if k != "optim"}}
    optim = OptimConfig(name=keys.get("optim", OptimName.adam))
    return TrainConfig(coder=CoderConfig(**coder), optim=optim, train=LoopConfig(shards=4))


def test_what_cannot_be_spread_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"coder.width=66: must be a multiple of train.shards=4"):
        config(width=66)
    with pytest.raises(UserError, match=r"optim=muon needs whole matrices"):
        config(optim=OptimName.muon)
    with pytest.raises(UserError, match=r"groupmax needs coder.k=2 to be a multiple of train.shards=4"):
        check(config(activation=ActivationName.groupmax, k=2))
    with pytest.raises(UserError, match=r"train.shards=4 needs a multiple of 4 processes, here are 1: start them with"):
        Ranks.join(4)


def test_the_numbers_of_the_documentation_are_those_measured() -> None:
    measured = json.loads((REPO / "benchmarks" / "shards-2-cores-2026-11-27.json").read_text())
    page = (REPO / "docs" / "cluster.md").read_text()
    for one in measured["measured"]:
        sent = [f"{one['bytes a process'][way] / 1e6:.1f}" for way in ("shards", "data parallel")]
        assert f"| {one['width']:,} | {one['processes']} | {' | '.join(sent)} | {one['ratio']:.2f} |" in page
        for way, by_arithmetic in one["by arithmetic"].items():
            assert one["bytes a process"][way] == pytest.approx(by_arithmetic, rel=0.01)
    assert max(measured["widest"]["peak GiB"]) < 9.6
