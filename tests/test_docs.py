"""The commands of README and docs run, one after another in one folder, on a small model and with small numbers.

Captures run without Ray. What asks for a hub, a cluster or all evaluations is only composed (test_readme.py);
test_real_model.py follows the quick start as it stands.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from skipcoder.pipeline.capture import job
from skipcoder.pipeline.capture.worker import Worker
from skipcoder.pipeline.config import ModelConfig, RayConfig
from skipcoder.pipeline.store.place import Place
from tests.conftest import REPO, make_tiny_model
from tests.documented import ENTRIES, Command, commands
from tests.evals.explain.judging import Oracle

pytestmark = pytest.mark.docs

ELSEWHERE = (
    "ray.address",
    "launcher.address",
    "model=gemma",
    "judge=llama",
    "s3://",
    "tasks=",
    "circuit_tracer",
    "runs/sizes",
    "explore.py",
)
SMALL = {
    "cache": {"data.tokens": "2048", "data.context": "16", "store.unit_rows": "4", "micro_batch_tokens": "64"},
    "train": {"train.tokens": "640", "train.batch_tokens": "64", "coder.width": "128", "train.eval_tokens": "64"},
    "evaluate": {"ce_tokens": "128"},
    "interpret": {"latents": "3", "examples.window": "8", "examples.train": "4", "examples.test": "4"},
}
RUN = sorted(
    (c for c in commands() if c.page != "index.md" and not any(word in str(c) for word in ELSEWHERE)),
    key=lambda c: (list(ENTRIES).index(c.entry), "data.tokens" in c.arguments),  # what extends a store comes later
)


class Clueless(Oracle):
    """Says no to everything."""

    def answers(self, system: str, user: str) -> list[int]:
        return [0] * len(re.findall(r"^Excerpt \d+: ", user, re.MULTILINE))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Iterator[str]:
    """A judge's address. The working directory has a model, with the layers of the default hookpoint, and texts under
    the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    make_tiny_model(folder / "models" / "mine", text_file, layers=11)
    shutil.copytree(folder / "models" / "mine", folder / "models" / "tuned")
    (folder / "texts").mkdir()
    (folder / "texts" / "some.jsonl").write_text(text_file.read_text())
    (folder / "chats").mkdir()
    lines = [json.loads(line)["text"][:40] for line in text_file.read_text().splitlines()]
    talks = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairwise(lines)]
    (folder / "chats" / "some.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (folder / "models" / "mine" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    (folder / "trainer").symlink_to(REPO / "trainer")

    def run_units(store: Place, attrs: dict, units: list[int], model: ModelConfig, cfg: RayConfig) -> None:
        Worker(store.address, model, torch.get_num_threads(), "cpu")({"item": np.array(units)})

    with pytest.MonkeyPatch.context() as patch, Clueless().serving() as address:
        patch.chdir(folder)
        patch.setattr(job, "run", run_units)
        yield address


def small(command: Command, judge: str) -> list[str]:
    """Its words, with small numbers in place of its own."""
    numbers = dict(SMALL.get(command.entry, {}))
    if command.entry == "cache":
        if "data.tokens" in command.arguments:
            numbers["data.tokens"] = "4096"
        if "model.id" not in command.arguments:
            numbers |= {"model.name": "tiny", "model.id": "models/mine", "model.gguf_file": "null"}
    kept = [word for word in command.words if word.split("=")[0] not in numbers]
    kept = [re.sub(r"^judge.base_url=.*", f"judge.base_url={judge}", word) for word in kept]
    return [*kept, *(f"{key}={value}" for key, value in numbers.items())]


@pytest.mark.parametrize("command", RUN, ids=str)
def test_command_runs(command: Command, judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = small(command, judge)
    if command.program.startswith("torchrun"):
        launcher = [sys.executable, "-m", "torch.distributed.run", *command.program.split()[1:]]
        done = subprocess.run([*launcher, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    module = import_module(f"skipcoder.{ENTRIES[command.entry]}.{command.entry}")
    monkeypatch.setattr(sys, "argv", [command.entry, *words])
    with pytest.raises(SystemExit) as end:
        module.cli_main()
    assert not end.value.code
