from __future__ import annotations

import pytest

from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError

TABLE = {"sigmoid": 1, "ipo": 2, "cdpo": 3, "rdpo": 4}


def test_a_known_name_gives_its_entry() -> None:
    assert [lookup("loss", name, TABLE) for name in TABLE] == [1, 2, 3, 4]


def test_a_near_name_is_asked_about() -> None:
    with pytest.raises(InputError, match=r"^unknown loss 'sigmod'; did you mean sigmoid\?$"):
        lookup("loss", "sigmod", TABLE)
    with pytest.raises(InputError, match=r"did you mean rdpo or cdpo or ipo\?$"):
        lookup("loss", "xdpo", TABLE)


def test_a_far_name_is_answered_with_all() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'zz'; there are sigmoid, ipo, cdpo, rdpo$"):
        lookup("loss", "zz", TABLE)


def test_case_counts() -> None:
    with pytest.raises(InputError, match="'IPO'"):
        lookup("loss", "IPO", TABLE)
