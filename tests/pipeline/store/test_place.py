"""What a store's files rest on, the same for a directory and for a bucket of a real S3 API (moto's server)."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.store import commit, writer
from skipcoder.pipeline.store.place import Directory, Place
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.verify import problems
from skipcoder.testing import PlaceTests
from skipcoder.trainer.bank import bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, LoopConfig, TrainConfig
from skipcoder.trainer.data.stream import ActivationStream
from tests.conftest import REPO
from tests.pipeline.store.test_writer import files
from tests.pipeline.test_cache_cli import command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of an empty bucket; the environment points to its server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


def content(at: Place) -> dict[str, bytes]:
    return {name: at.read(name) for name in sorted(at.sizes())}


class OurPlaceTests(PlaceTests):
    """Beside the promises of `Place`: its names, and whole captures."""

    def test_names(self, here: Place) -> None:
        assert place_at(str(here)).address == here.address and here.stem == "s"
        other = place_at(f"{here.parent}/t.zarr")
        other.write("zarr.json", b"")
        here.write("zarr.json", b"")
        assert [n.stem for n in here.neighbours()] == ["t"] and [n.stem for n in other.neighbours()] == ["s"]

    def test_a_capture_there_is_the_same_as_anywhere(
        self, here: Place, cache_config: Callable[..., CacheConfig], capture_here: Callable, tmp_path: Path
    ) -> None:
        """Captured, grown, damaged, mended, read, in each codec that has arrays of all kinds."""
        for codec in ("bf16", "int8"):
            reference = capture_here(cache_config(tmp_path / f"{codec}.zarr", rows=100, codec=codec))
            at = place_at(f"{here}/{codec}.zarr")
            for rows in (70, 100):
                store = capture_here(cache_config(at, rows=rows, codec=codec))
            assert content(at) == files(reference.path) and list(problems(at)) == []
            streams = [list(ActivationStream(s, "layers.1.mlp", 64, epochs=1)) for s in (store, reference)]
            for a, b in zip(*streams, strict=True):
                assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.position, b.position)
            commit.withdraw(at, 3)
            at.write("layers.1.mlp/output/c/3/0", b"torn")
            capture_here(cache_config(at, rows=100, codec=codec))
            assert content(at) == files(reference.path)


class TestDirectory(OurPlaceTests):
    @pytest.fixture
    def here(self, tmp_path: Path) -> Place:
        return place_at(tmp_path / "s.zarr")

    def test_what_a_failed_write_leaves(self, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file that was there, and nothing else."""
        here.write("a", b"old")

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError):
            here.write("a", b"new")
        assert here.sizes() == {"a": 3} and here.read("a") == b"old"

    def test_what_may_be_removed(self, here: Place, tmp_path: Path) -> None:
        """By the only writer: our own files in the making; or everything, so that a store can be made there."""
        here.write("a/b", b"1")
        for name in ("a/.b.17-140.partial", "a/film.partial", "a/.film.partial"):
            (tmp_path / "s.zarr" / name).write_bytes(b"")
        here.sweep()
        assert sorted(here.sizes()) == ["a/.film.partial", "a/b", "a/film.partial"]
        here.clear()
        assert here.is_empty()

    def test_of_two_writers_one_is_refused(self, here: Place) -> None:
        with here.only_writer() as alone:
            assert alone
            with pytest.raises(UserError, match="another capture is at work"), here.only_writer():
                pass
        with here.only_writer() as alone:
            assert alone

    def test_file_systems_without_locks(self, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_locks(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        with here.only_writer() as alone:
            assert not alone

    def test_file_systems_without_hard_links(self, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
        assert here.create("a", b"1") and not here.create("a", b"2")
        assert here.read("a") == b"1" and list(here.sizes()) == ["a"]


@pytest.mark.cli
class TestBucket(OurPlaceTests):
    @pytest.fixture
    def here(self, bucket: str, tmp_path: Path) -> Place:
        return place_at(f"{bucket}/{tmp_path.name}/s.zarr")

    @pytest.mark.ray
    def test_two_captures_at_once_write_the_same(
        self, here: Place, tiny_model: Path, text_file: Path, tmp_path: Path, store: ActivationStore
    ) -> None:
        """Object stores have no locks. Both commands, with Ray, end well; then the third finds nothing to do."""
        run = command(tiny_model, text_file, str(here))
        both = [
            subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)
        ]
        said = [job.communicate(timeout=300)[0] for job in both]
        assert [job.returncode for job in both] == [0, 0], said
        assert content(here) == files(store.path)
        again = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert "complete, nothing to do" in again.stdout
        info = [sys.executable, str(REPO / "pipeline" / "store_cli.py"), "info", str(here)]
        assert "33 of 33" in subprocess.run(info, capture_output=True, text=True, timeout=60).stdout

    def test_training_from_there_is_training_from_here(
        self, here: Place, cache_config: Callable[..., CacheConfig], capture_here: Callable, tmp_path: Path
    ) -> None:
        weights: list[dict[str, torch.Tensor]] = []
        for at in (str(here), str(tmp_path / "s.zarr")):
            capture_here(cache_config(at, rows=100))
            cfg = TrainConfig(coder=CoderConfig(k=4, width=64), train=LoopConfig(tokens=3000, batch_tokens=128))
            cfg.store.path = at
            bank.train(cfg, run := tmp_path / f"run{len(weights)}")
            weights.append(SparseCoder.load(run).state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    def test_captures_of_different_lengths_at_once_are_told(self, here: Place) -> None:
        record = commit.Commit("id", 3, (12, 14), 0, {})
        commit.write(here, record)
        commit.write(here, record)
        with pytest.raises(UserError, match="unit 3 was committed by another capture"):
            commit.write(here, commit.Commit("id", 3, (12, 16), 0, {}))

    @pytest.mark.cli
    def test_what_web_consoles_make_of_a_folder_is_nothing(self, bucket: str, here: Place) -> None:
        import boto3

        key = str(here).removeprefix(f"{bucket}/") + "/"
        boto3.client("s3", region_name="us-east-1").put_object(Bucket="bucket", Key=key, Body=b"")
        assert here.is_empty() and here.sizes() == {}

    def test_an_unfinished_layout_of_another_capture_is_refused(
        self, here: Place, cache_config: Callable[..., CacheConfig], capture_here: Callable
    ) -> None:
        """It may be alive, since there are no locks."""
        store = capture_here(cache_config(here, rows=40))
        described: Any = {**store.attrs, "rows": 0}
        writer.create(other := place_at(f"{here.parent}/t.zarr"), described)
        with pytest.raises(UserError, match="unit_rows: 4 there, 2 asked"):
            capture_here(cache_config(other, rows=40, unit_rows=2))

    @pytest.mark.cli
    def test_no_such_bucket(self, bucket: str) -> None:
        with pytest.raises(UserError, match=r"s3://no-such-bucket/s.zarr: .*check the address, the account"):
            ActivationStore.open("s3://no-such-bucket/s.zarr")


def test_addresses_of_other_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="begin with s3:// or gs://"):
        place_at("hdfs://host/s.zarr")
    assert isinstance(place_at("a:b"), Directory)
    for path in (".", "/", ""):
        with pytest.raises(UserError, match="name a directory of its own"):
            place_at(path)
    with pytest.raises(UserError, match=r"as s3://bucket/name.zarr"):
        place_at("s3://bucket/")
