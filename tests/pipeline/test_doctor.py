"""What the doctor says of a machine."""

from pathlib import Path

import pytest
import torch

from skipcoder.pipeline import doctor


def said(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["doctor", str(folder)])
    with pytest.raises(SystemExit) as end:
        doctor.cli_main()
    assert end.value.code == 0
    return capsys.readouterr().out


def test_all_is_named_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(tmp_path / "not" / "yet", monkeypatch, capsys)
    for word in (
        "Python",
        f"torch {torch.__version__}",
        "threads",
        "GiB free",
        "MB/s written",
        "Ray",
        "HF_HUB_OFFLINE",
    ):
        assert word in text, word
    assert str(tmp_path) in text and not list(tmp_path.iterdir())


def test_what_will_be_slow_or_missing_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "SLOW_DISK", 1e15)
    monkeypatch.setitem(doctor.EXTRAS, "explore", ("no_such_module", "no evals/explore.py"))
    text = said(tmp_path, monkeypatch, capsys)
    for warning in (
        "! GPU", "! disk", "slow: a GPU would wait for it", "no bfloat16 instructions",
        "! extra explore", "pip install 'skipcoder[explore]'", "! hub",
    ):  # fmt: skip
        assert warning in text, warning
