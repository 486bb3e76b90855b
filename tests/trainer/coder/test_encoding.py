"""The modes that nominate: recall of the float32 choice, and the way back when it drops."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder import encoding
from skipcoder.trainer.coder.encoding import fastest_mode, recall
from skipcoder.trainer.config import CoderConfig, EncodeConfig, EncodeMode, Kind, LoopConfig, OptimConfig, TrainConfig
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import make_learner
from skipcoder.trainer.step.learner import Learner

HOOKPOINT = "layers.1.mlp"


def learner(store: ActivationStore, mode: EncodeMode, **encode: Any) -> Learner:
    cfg = TrainConfig(
        coder=CoderConfig(kind=Kind.transcoder, k=16, width=64),
        optim=OptimConfig(lr=1e-2),
        train=LoopConfig(tokens=20_000, batch_tokens=256, log_every=2),
        encode=EncodeConfig(mode=mode, **encode),
    )
    return make_learner(cfg, store, HOOKPOINT, 50, "cpu")


@pytest.mark.parametrize("mode", EncodeMode)
def test_recall(store: ActivationStore, mode: EncodeMode) -> None:
    one = learner(store, mode)
    batch = next(iter(ActivationStream(store, HOOKPOINT, 1800)))
    x = batch.x / one.reads.scale
    assert recall(one.coder, x, len(x)) > 0.999
    one.coder.search = one.coder.search._replace(nominated=1.0)
    assert one.coder.search.mode == mode.value  # measuring leaves the encoding as it was
    if mode is not EncodeMode.float32:
        assert recall(one.coder, x, len(x)) < 1  # nobody to choose from: the estimate alone decides


def test_recall_of_nothing_is_no_reason_to_fall_back(store: ActivationStore) -> None:
    """A rank may get none of an epoch's last tokens; an untrained coder may be silent."""
    coder = learner(store, EncodeMode.scout).coder
    assert recall(coder, torch.zeros(0, coder.d_in)) == 1
    with torch.no_grad():
        coder.b_enc.sub_(1e6)
    assert recall(coder, torch.randn(5, coder.d_in)) == 1


def test_too_little_recall_moves_to_the_next_mode_and_is_resumed(store: ActivationStore) -> None:
    one = learner(store, EncodeMode.scout, nominated=1.0, min_recall=1.0)
    modes = []
    for i, batch in enumerate(ActivationStream(store, HOOKPOINT, 256, pool_chunks=8)):
        one.step(batch.x, batch.y, batch.tokens)
        modes.append(one.coder.search.mode)
        if i == 8:
            break
    assert modes[0] in ("scout", "bfloat16") and modes[-1] == "float32"
    assert [m for i, m in enumerate(modes) if i == 0 or m != modes[i - 1]][-2:] == ["bfloat16", "float32"]
    again = learner(store, EncodeMode.scout, nominated=1.0, min_recall=1.0)
    again.load_state_dict(one.state_dict())
    assert again.coder.search.mode == "float32" and again.recall == one.recall
    assert one.folded().search.mode == "float32"


def test_the_fastest_mode_depends_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, mode in (
        ({}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_vnni": True, "avx512_bf16": True}, "scout"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert fastest_mode("cpu", 2**20) == mode
    for fp8, width, mode in ((torch.float8_e4m3fn, 2**15, "fp8"), (None, 2**15, "bfloat16"), (1, 2**14, "bfloat16")):
        monkeypatch.setattr(encoding, "fp8_type", lambda device, fp8=fp8: fp8)
        assert fastest_mode("cuda:0", width) == mode


@pytest.mark.cli
def test_importing_and_training_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, skipcoder\n"
        "from skipcoder.trainer.config import CoderConfig\n"
        "coder = skipcoder.SparseCoder(CoderConfig(k=2, width=8), 4, 4)\n"
        "coder(torch.randn(3, 4)).y_hat.sum().backward()\n"
        "print(coder.W_dec.grad.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([8, 4])" in done.stdout, done.stderr
