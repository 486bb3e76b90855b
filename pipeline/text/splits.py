"""Which units of a store are for training, which for validation (numbers looked at while choosing), and which for tests
(numbers that are reported)."""

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")

EVERY = 16
"""Of so many units one is for validation and one for tests."""

BY_DOCUMENT = "document-1"
"""The scheme of new stores: a unit's rows are of documents of its split alone."""


def split_of(unit: int) -> str:
    """The split of a unit, whatever the seeds, also in a store that grows.

    >>> [split_of(unit) for unit in (0, 7, 15, 16)]
    ['train', 'validation', 'test', 'train']
    """
    return {EVERY // 2 - 1: VALIDATION, EVERY - 1: TEST}.get(unit % EVERY, TRAIN)
