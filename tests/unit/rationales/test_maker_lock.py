"""A rank waits for another process's pool as long as that process works, and no longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mmemb.rationales.maker_lock import at_work, sign_of, wait_until


def watch_and_die(sign: Path) -> None:
    """Waits until the sign is touched, then fails."""
    with at_work(sign, beat=0.01):
        os.utime(sign, (0, 0))
        until = time.monotonic() + 60
        while sign.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyError(sign.stat().st_mtime > 0)


def test_a_maker_touches_its_sign_until_it_ends_or_fails(tmp_path: Path) -> None:
    sign = sign_of(tmp_path / "pools" / "mine")
    with pytest.raises(KeyError, match="True"):
        watch_and_die(sign)
    assert not sign.exists()


def test_a_waiting_rank_waits_while_the_maker_works(tmp_path: Path) -> None:
    sign, looks = tmp_path / "sign", []
    sign.touch()

    def whole() -> bool:
        looks.append(len(looks))
        os.utime(sign, (len(looks), len(looks)))
        return len(looks) > 20

    wait_until(whole, sign, every=0, patience=0)
    assert len(looks) == 21


@pytest.mark.parametrize("left_behind", [False, True])
def test_a_waiting_rank_ends_if_the_maker_failed_or_was_killed(tmp_path: Path, left_behind: bool) -> None:
    sign = tmp_path / "pool.making"
    if left_behind:
        sign.touch()
    with pytest.raises(ValueError, match=r"pool\.making: not touched for 0 s.*start the run again") as told:
        wait_until(lambda: False, sign, every=0, patience=0.05)
    assert "\n" not in str(told.value)
