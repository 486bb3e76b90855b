from hypothesis import given
from hypothesis import strategies as st

from skipcoder.trainer.data.order import block_permutation, epoch_order

units = st.lists(st.integers(0, 9), min_size=1, max_size=60)


@given(units, st.integers(0, 50), st.integers(0, 5))
def test_every_chunk_once_and_neighbours_from_different_units(unit_of: list[int], seed: int, epoch: int) -> None:
    order = epoch_order(seed, epoch, unit_of).tolist()
    assert sorted(order) == list(range(len(unit_of)))
    distinct = len(set(unit_of))
    assert len({unit_of[chunk] for chunk in order[:distinct]}) == distinct


@given(units, st.integers(0, 50))
def test_epochs_differ_and_repeat_by_seed(unit_of: list[int], seed: int) -> None:
    assert epoch_order(seed, 0, unit_of).tolist() == epoch_order(seed, 0, unit_of).tolist()
    if len(unit_of) > 12:
        assert epoch_order(seed, 0, unit_of).tolist() != epoch_order(seed, 1, unit_of).tolist()


def test_golden_order() -> None:
    """Resuming old runs depends on it: a change here changes what `stream.seed` means."""
    assert epoch_order(0, 1, [0, 0, 1, 1, 2, 2]).tolist() == GOLDEN_CHUNKS
    assert block_permutation(0, 1, 2, 6).tolist() == GOLDEN_BLOCK


GOLDEN_CHUNKS = [3, 4, 1, 2, 5, 0]
GOLDEN_BLOCK = [2, 0, 1, 3, 5, 4]
