"""Tests that every source of text passes."""

import json
from itertools import islice

import pytest

from skipcoder.pipeline.config import DataConfig
from skipcoder.pipeline.text import sources

SOME = 200
"""Documents read by a test."""


class SourceTests:
    """Inherit, register the source in SOURCES, and override the fixture `cfg`."""

    @pytest.fixture
    def cfg(self) -> DataConfig:
        """A configuration that selects the source, with a path if it needs one."""
        raise NotImplementedError

    def test_the_same_documents_every_time(self, cfg: DataConfig) -> None:
        sources.check(cfg)
        once, again = (list(islice(sources.documents(cfg), SOME)) for _ in range(2))
        assert once and once == again and all(isinstance(document, str) for document in once)

    def test_its_identity_is_stable_and_can_be_stored(self, cfg: DataConfig) -> None:
        identity = sources.identity(cfg)
        assert identity == sources.identity(cfg) == json.loads(json.dumps(identity))
        assert identity["kind"] == cfg.kind and identity["fingerprint"]
