"""Scoring loses nothing: a process is killed at three points, and the next runs finish the same pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmemb.rationales.generate import generate
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import score
from tests.unit.rationales.fakes import ByNumber, Numbered, make_pairs

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pyarrow.parquet as pq
from mmemb.rationales import score as select
from tests.unit.rationales.fakes import ByNumber, make_pairs

folder, point = Path(sys.argv[2]), sys.argv[3]
write, written = pq.write_table, 0

def slow(table, path, **options):
    global written
    write(table, path, **options)
    written += 1
    if point == f"writing {written}":  # the shard has its temporary name
        (folder.parent / "here").touch()
        time.sleep(60)

class Slow(ByNumber):
    def score(self, pairs, rationales):
        found = super().score(pairs, rationales)
        if point == f"scoring {self.calls}":
            (folder.parent / "here").touch()
            time.sleep(60)
        return found

    @property
    def settings(self):
        return ByNumber().settings

Slow.__qualname__ = "ByNumber"
pq.write_table = slow
select.score(make_pairs(22), Slow(), folder, progress=False)
"""


def kill_at(point: str, pool: Path) -> None:
    """Scores in another process, and kills the process when it reports that it has reached the point."""
    here = pool.parent / "here"
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(pool), point]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not here.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert here.exists(), process.communicate()[1]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    here.unlink()


@pytest.fixture
def new_pool(tmp_path: Path) -> Callable[[str], Path]:
    """Makes unscored pools of six shards."""

    def make(name: str) -> Path:
        folder = tmp_path / name / "pool"
        generate(make_pairs(22), [Numbered()], 4, pool=folder, seed=0, progress=False, shard_size=4)
        return folder

    return make


@pytest.mark.slow
def test_scoring_killed_at_three_points_ends_with_the_same_scores(new_pool: Callable[[str], Path]) -> None:
    whole, pool = new_pool("whole"), new_pool("killed")
    score(make_pairs(22), ByNumber(), whole, progress=False)
    kill_at("scoring 1", pool)  # before anything is written
    assert list(pool.glob("scores-*.parquet")) == []
    kill_at("writing 3", pool)  # a half-written shard: two are whole, the third has a temporary name
    assert len(list(pool.glob("scores-*.parquet"))) == 2
    assert list(pool.glob("*.part"))
    kill_at("scoring 3", pool)  # after two more
    assert len(list(pool.glob("scores-*.parquet"))) == 4
    assert not RationalePool.open(pool).complete

    assert not list(pool.glob("*.part"))  # a run removes the unfinished files of a killed run
    evaluator = ByNumber()
    score(make_pairs(22), evaluator, pool, progress=False)
    assert evaluator.calls == 2  # the two missing shards
    for path in whole.iterdir():
        assert path.read_bytes() == (pool / path.name).read_bytes()
    found, wanted = RationalePool.open(pool), RationalePool.open(whole)
    assert list(found) == list(wanted) == [pair.id for pair in make_pairs(22)]
    assert [found.candidates(each) for each in found] == [wanted.candidates(each) for each in wanted]
