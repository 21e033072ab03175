"""Fixtures of the cache tests."""

import pytest

import hf_ext


CACHES = (hf_ext.OjaKVCache, hf_ext.PackedCache, hf_ext.SentenceKVCache, hf_ext.HybridKVCache)


@pytest.fixture
def _registered():
    with hf_ext.registered():
        yield


@pytest.fixture
def built(monkeypatch):
    """Caches made while the test runs."""
    made = []
    for cls in CACHES:
        original = cls.__init__

        def record(self, *args, original=original, **kwargs):
            made.append(self)
            original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", record)
    return made
