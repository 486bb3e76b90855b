"""The capture command as users run it: a real Ray cluster, killed, resumed, misused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from tests.conftest import CONTEXT, REPO, UNIT_ROWS, UNITS
from tests.pipeline.store.test_writer import files

pytestmark = pytest.mark.ray


def command(tiny_model: Path, text_file: Path, path: Path | str, *more: str, kind: str = "jsonl") -> list[str]:
    return [
        *(sys.executable, str(REPO / "pipeline" / "cache.py"), "model=local", "model.name=tiny"),
        *(f"model.id={tiny_model}", "hookpoints=[layers.*.mlp]", f"data={kind}", f"data.path={text_file}"),
        *(f"data.tokens={UNITS * UNIT_ROWS * CONTEXT}", f"data.context={CONTEXT}", f"store.path={path}"),
        *(f"store.unit_rows={UNIT_ROWS}", f"micro_batch_tokens={2 * CONTEXT}", *more),
    ]


def test_ray_writes_what_one_process_writes_and_survives_kill_9(
    tiny_model: Path, text_file: Path, tmp_path: Path, store: ActivationStore
) -> None:
    path = tmp_path / "s.zarr"
    run = command(tiny_model, text_file, path)
    job = subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and not (path / "commits").exists():
        time.sleep(0.01)
    deadline = time.monotonic() + 120
    while job.poll() is None and not commit.committed_units(place_at(path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert 0 < len(commit.committed_units(place_at(path))) <= UNITS
    time.sleep(3)  # orphaned workers of a killed driver may write that long
    again = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert files(path) == files(store.path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left in (["s.capture.jsonl", "s.zarr"], ["s.zarr"])  # no log where the killed run had done it all


def fails(*args: str, cwd: Path, code: int = 2) -> str:
    """Run an entry point that must fail: one message, no traceback."""
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    return done.stderr


CACHE, TRAIN, EVALUATE = (str(REPO / p) for p in ("pipeline/cache.py", "trainer/train.py", "evals/evaluate.py"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([CACHE, "model=no-such"], "Available options in 'model':\n\tgemma-2-2b"),
        ([CACHE, "data.tokenz=3"], "valid keys: chat, chat_template, context, field, held_out_rows, kind"),
        ([CACHE, "+data.tokenz=3"], "valid keys: chat, chat_template, context, field, held_out_rows, kind"),
        ([CACHE, "data.tokens=many"], "'many' of type 'str' could not be converted to Integer"),
        ([CACHE, "data.tokens=0"], "data.tokens=0: ask for at least 1 token"),
        ([CACHE, "store.codec=int3"], "choose from bf16, int8, fp8"),
        ([CACHE, "data=text"], "data.path"),
        ([CACHE, "model=local", "model.id=/no/where", "hookpoints=[a]"], "no such directory"),
        ([CACHE, "store.path='a"], "hint: put values"),
        ([CACHE, "store.path=ftp://host/x"], "begin with s3:// or gs://"),
        ([CACHE, "data.context=9000", "store.path=x.zarr"], "smollm2-135m-instruct-q4 takes at most 8192 tokens"),
        ([CACHE, "hookpoints=[embed_tokens]", "store.path=x.zarr"], "one vector per token"),
        ([CACHE, "ray.address=10.255.255.1:1", "data.tokens=4096", "ray.workers=0"], "ray.workers=0"),
        ([TRAIN, "optim.clip=0"], "optim.clip=0.0: must be positive"),
        ([TRAIN], "store.path is not set and there is none under stores/"),
        ([TRAIN, "store.path=nowhere.zarr"], "make one with: python pipeline/cache.py"),
        ([TRAIN, "coder.k=65", "coder.width=64"], "coder.k=65 must be between 1 and coder.width=64"),
        ([TRAIN, "coder=dense"], "Available options in 'coder'"),
        ([TRAIN, "train.device=cuda"], "store.path is not set"),
        ([EVALUATE], "set either run=DIR or runs='GLOB'"),
        ([EVALUATE, "run=nowhere"], "run=nowhere: no such directory"),
        ([EVALUATE, "runs=nowhere/*"], "matches no run directory"),
    ],
)
def test_mistakes_get_one_message(args: list[str], message: str, tmp_path: Path) -> None:
    assert message in fails(*args, cwd=tmp_path)
    assert not list(tmp_path.glob("*.zarr"))


def test_a_store_of_another_capture_is_refused_by_the_command(
    tiny_model: Path, text_file: Path, store: ActivationStore, tmp_path: Path
) -> None:
    run = command(tiny_model, text_file, store.path, "seed=5")
    assert "holds another capture (seed: 0 there, 5 asked)" in fails(*run[1:], cwd=tmp_path)


def test_text_that_is_not_utf8(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    run = command(tiny_model, tmp_path / "bad.txt", tmp_path / "s.zarr", kind="text")
    assert "bad.txt is not UTF-8 (byte 3 is 0xe9)" in fails(*run[1:], cwd=tmp_path)


@pytest.mark.parametrize("script", [CACHE, TRAIN, EVALUATE])
def test_help_explains(script: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"python {Path(script).relative_to(REPO)}" in done.stdout


def test_gemma_preset_captures_what_the_residual_stream_sees() -> None:
    from hydra import compose, initialize_config_dir

    import skipcoder.pipeline.cache  # noqa: F401 (registers the schema)

    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cfg = compose("cache", ["model=gemma-2-2b"])
    assert cfg.model.write_modules == {"layers.*.mlp": "layers.*.post_feedforward_layernorm"}
    assert cfg.hookpoints == ["layers.12.mlp"]
