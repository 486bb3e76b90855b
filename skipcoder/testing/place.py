"""Tests that every place passes: what a store relies on."""

import threading

import pytest

from skipcoder.pipeline.store.place import Place


class PlaceTests:
    """Inherit, and override the fixture `here`."""

    @pytest.fixture
    def here(self) -> Place:
        """An empty place named s.zarr, in a folder of its own."""
        raise NotImplementedError

    def test_files(self, here: Place) -> None:
        assert here.is_empty() and here.sizes() == {} and not here.exists("a/b")
        with pytest.raises(FileNotFoundError):
            here.read("a/b")
        here.write("a/b", b"one")
        here.write("a/b", b"four")
        here.write("c", b"")
        assert here.read("a/b") == b"four" and here.exists("a/b") and not here.exists("a")
        assert here.sizes() == {"a/b": 4, "c": 0} and here.sizes("a") == {"a/b": 4} and not here.is_empty()
        here.delete("c")
        assert here.sizes() == {"a/b": 4}

    def test_ranges(self, here: Place) -> None:
        here.write("x", bytes(range(100)))
        assert bytes(here.read_range("x", 10, 5)) == bytes(range(10, 15))
        assert bytes(here.read_range("x", -7, 7)) == bytes(range(93, 100))
        assert bytes(here.read_range("x", 98, 5)) == bytes([98, 99])
        here.write("empty", b"")
        assert not len(here.read_range("x", 100, 5)) and not len(here.read_range("x", 150, 5))
        assert not len(here.read_range("empty", 0, 5)) and not len(here.read_range("empty", -7, 7))
        with pytest.raises(FileNotFoundError):
            here.read_range("y", 0, 5)
        first, second = memoryview(bytearray(3)), memoryview(bytearray(2))
        assert here.read_into("x", 20, first, second) and bytes(first) + bytes(second) == bytes(range(20, 25))
        assert not here.read_into("x", 97, first, second)
        here.write("x", b"other", memoryview(b" words"))
        assert bytes(here.read_range("x", 0, 20)) == b"other words"
        here.delete("x")
        with pytest.raises(FileNotFoundError):
            here.read_range("x", 0, 5)

    def test_of_many_that_create_one_succeeds(self, here: Place) -> None:
        won: list[int] = []

        def create(i: int) -> None:
            if here.create("record", bytes([i]) * 1000):
                won.append(i)

        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = won
        assert here.read("record") == bytes([winner]) * 1000
        assert list(here.sizes()) == ["record"]  # the others left nothing behind
