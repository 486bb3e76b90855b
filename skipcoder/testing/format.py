"""Tests that every coder format passes."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.trainer.coder import readers
from skipcoder.trainer.coder.coder import SparseCoder


class FormatTests:
    """Inherit, register the format in READERS, set its `name`, and override `coder` and `write`."""

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    """Options for reading."""

    @pytest.fixture
    def coder(self) -> SparseCoder:
        """A coder that the format can hold unchanged."""
        raise NotImplementedError

    def write(self, coder: SparseCoder, folder: Path) -> None:
        """Write the coder's files into a folder."""
        raise NotImplementedError

    def test_round_trip(self, coder: SparseCoder, tmp_path: Path) -> None:
        self.write(coder, tmp_path)
        assert readers.detect(tmp_path) == self.name
        again = readers.read(tmp_path, **self.options)
        assert isinstance(again, SparseCoder) and not again.training
        ours, theirs = coder.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        x = torch.randn(50, coder.d_in, generator=torch.Generator().manual_seed(1))
        assert torch.equal(coder(x).y_hat, again(x).y_hat)

    def test_the_same_files_every_time(self, coder: SparseCoder, tmp_path: Path) -> None:
        for name in ("once", "again"):
            self.write(coder, tmp_path / name)
        once, again = (
            {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in ("once", "again")
        )
        assert once and once == again

    def test_damaged_files_are_named(self, coder: SparseCoder, tmp_path: Path) -> None:
        self.write(coder, tmp_path)
        for file in tmp_path.rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(UserError, match=str(tmp_path)):
            readers.read(tmp_path, self.name, **self.options)
