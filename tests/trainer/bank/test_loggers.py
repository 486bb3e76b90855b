import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.bank import train, train_bank
from tests.trainer.bank.test_bank import config
from tests.trainer.run.test_run import train_killed_after

pytestmark = pytest.mark.slow


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
    assert {"dead", "recall", "ms/encode", "validation_fvu"} <= set(events.Tags()["scalars"])


def test_without_the_package_the_remedy_is_named(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    cfg = config(store)
    cfg.train.tensorboard = True
    with pytest.raises(UserError, match=r"train.tensorboard=true needs: pip install 'skipcoder\[tensorboard\]'"):
        train(cfg, tmp_path)


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Records of a W&B file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB)."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb_has_a_run_for_each_member_of_a_bank(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B itself, offline: its files hold the lines of metrics.jsonl; an interruption goes on in the same run; a member
    that fails is shown as failed."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfgs = [config(store, k=4), config(store, k=8), config(store, lr=1e18)]
    for cfg in cfgs:
        cfg.train.wandb = "skipcoder-tests"
    train_killed_after(cfgs[0], tmp_path / "0", 17, monkeypatch)
    outcomes = train_bank([(cfg, tmp_path / str(i)) for i, cfg in enumerate(cfgs)])
    assert [outcome.error is None for outcome in outcomes] == [True, True, False]
    ids, exits = set(), []
    for outcome in outcomes:
        seen: dict[int, float] = {}
        for file in sorted(outcome.directory.glob("wandb/offline-run-*/*.wandb")):
            for data in leveldb_log(file.read_bytes()):
                record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
                record.ParseFromString(data)
                if record.WhichOneof("record_type") == "run":
                    ids.add((outcome.directory, record.run.run_id))
                if record.WhichOneof("record_type") == "exit":
                    exits.append(record.exit.exit_code)
                for item in [record.history.item] if record.WhichOneof("record_type") == "history" else []:
                    facts = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in item}
                    seen.setdefault(facts["step"], facts["fvu"])
        metrics = outcome.directory / "metrics.jsonl"  # the failing member has none
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        assert seen == {line["step"]: line["fvu"] for line in lines}
    assert len(ids) == 3
    assert exits == [1, 0, 0, 1]  # interrupted, then finished; finished; failed
