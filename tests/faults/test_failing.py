"""A call to the system that fails is one line of ours, wherever it is, and loses nothing."""

from __future__ import annotations

import failing
import pytest


@pytest.mark.parametrize("seed", [0, 1])
def test_every_call_may_fail(seed: int) -> None:
    assert failing.run(90, seed) == (90, [])
