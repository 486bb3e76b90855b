import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skipcoder.pipeline.store import layout
from skipcoder.pipeline.text.splits import BY_DOCUMENT

sizes = st.integers(1, 500)


@given(rows=sizes, unit_rows=st.integers(1, 50))
def test_units_tile_the_rows(rows: int, unit_rows: int) -> None:
    units = layout.num_units(rows, unit_rows)
    covered = [row for unit in range(units) for row in layout.unit_token_rows(unit, rows, unit_rows)]
    assert covered == list(range(rows))


@given(units=st.integers(0, 300), more=st.integers(0, 300), scheme=st.sampled_from([None, BY_DOCUMENT]))
def test_split_is_disjoint_complete_and_stable_under_growth(units: int, more: int, scheme: str | None) -> None:
    of, grown = layout.split(units, scheme), layout.split(units + more, scheme)
    assert all(set(of[name]) <= set(grown[name]) for name in of)
    assert all(unit % 16 == 15 for unit in of["test"])
    if scheme is None:  # stores of before: runs on them go on with the units that they trained on
        assert of["validation"] == of["test"] and sorted(of["train"] + of["test"]) == list(range(units))
    else:
        assert all(unit % 16 == 7 for unit in of["validation"])
        assert sorted(of["train"] + of["validation"] + of["test"]) == list(range(units))


@given(seed=st.integers(0, 99), unit=st.integers(0, 99), size=sizes)
def test_permutation(seed: int, unit: int, size: int) -> None:
    assert sorted(layout.permutation(seed, unit, size)) == list(range(size))


def test_golden_permutation() -> None:
    """Stores on disk depend on this order: if numpy ever changes it, our own must take its place."""
    assert layout.permutation(0, 3, 8).tolist() == GOLDEN


@given(tokens=st.integers(1, 5000))
def test_chunk_divides_unit(tokens: int) -> None:
    chunk = layout.chunk_rows(tokens)
    assert tokens % chunk == 0
    assert chunk <= layout.MAX_CHUNK_ROWS or all(tokens % d for d in range(256, 2049))


def test_chunk_of_usual_units() -> None:
    assert [layout.chunk_rows(n) for n in (16384, 2048, 100, 3 * 4099)] == [2048, 2048, 100, 4099]


def test_auto_unit_rows() -> None:
    assert layout.auto_unit_rows(512, 256) == 8
    assert layout.auto_unit_rows(10**6, 256) == 64
    assert layout.auto_unit_rows(3, 256) == 1
    assert np.ceil(512 / layout.auto_unit_rows(512, 256)) >= 16


GOLDEN = [1, 3, 0, 6, 2, 5, 4, 7]
