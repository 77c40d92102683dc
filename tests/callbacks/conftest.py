"""A start that the tests of callbacks share."""

from __future__ import annotations

import pytest

from tpmm_pl.toy.start import LettersPolicy


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> LettersPolicy:
    cache = tmp_path_factory.mktemp("start")
    policy = LettersPolicy(
        hidden=16, layers=2, heads=2, ffn=32, steps=30, batch_size=16, cache_dir=cache
    )
    policy.prepare()
    return policy
