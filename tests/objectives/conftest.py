"""A small vocabulary that has every special token."""

from __future__ import annotations

import pytest

from lathe.objectives import SpecialTokens


@pytest.fixture
def special() -> SpecialTokens:
    return SpecialTokens(
        vocab_size=1000,
        pad=0,
        eos=1,
        cls=2,
        sep=3,
        mask=4,
        bos=5,
        sentinels=tuple(range(999, 899, -1)),
        decoder_start=0,
        reserved=(6,),
    )
