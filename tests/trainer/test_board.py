import json
import sys
from pathlib import Path

import pytest
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer.bank import train

from tests.trainer.test_bank import config
from tests.trainer.test_run import train_killed_after


def test_events_are_those_of_metrics_jsonl(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an interruption: every step once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = config(store)
    cfg.train.tensorboard = True
    train_killed_after(cfg, tmp_path, 17, monkeypatch)
    train(cfg, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("fvu")] == [(x["step"], x["fvu"]) for x in lines]
    assert {"dead", "recall", "ms/encode", "held_out_fvu"} <= set(events.Tags()["scalars"])


def test_without_the_package_the_remedy_is_named(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    cfg = config(store)
    cfg.train.tensorboard = True
    with pytest.raises(UserError, match=r"train.tensorboard=true needs: pip install 'skipcoder\[tensorboard\]'"):
        train(cfg, tmp_path)
