"""What `bench lora` measures of the programs that it compares."""

from __future__ import annotations

import sys

import pytest

from longctx.bench.lora import _child
from longctx.errors import RunFailed


def test_a_program_s_peak_is_its_own() -> None:
    """This process holds more than the program; the rusage of a started program would say so much."""
    held = bytearray(500 << 20)
    seconds, peak = _child([sys.executable, "-c", "x = bytearray(100 << 20); import time; time.sleep(0.3)"], threads=1)
    assert len(held) > 2 * 200 << 20
    assert 100 < peak < 200
    assert seconds > 0.3


def test_a_program_that_fails_says_its_last_words() -> None:
    with pytest.raises(RunFailed, match="no such thing"):
        _child([sys.executable, "-c", "import sys; sys.exit('no such thing')"], threads=1)
