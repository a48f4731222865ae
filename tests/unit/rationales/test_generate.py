"""Generation resumes exactly at any shard, and refuses a pool of other data or settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmemb.components.workers.corrupting import CorruptingWorker
from mmemb.rationales.generate import generate
from mmemb.rationales.leaks import LeakCheck
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.settings import PoolSettings
from mmemb.types import Candidates, Pair
from tests.unit.rationales.fakes import Killed, Numbered, make_pairs


def run(
    pairs: list[Pair], path: Path, *workers: Numbered, shard_size: int = 4, k: int = 3, seed: int = 0
) -> RationalePool:
    return generate(pairs, workers, k, pool=path, seed=seed, progress=False, shard_size=shard_size)


def rows(path: Path) -> dict[str, list[Candidates]]:
    pool = RationalePool.open(path)
    return {pair_id: pool.candidates(pair_id).rationales for pair_id in pool}  # type: ignore[misc]


def test_a_shard_has_its_pairs_in_order(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    worker = Numbered()
    pool = run(pairs, tmp_path / "pool", worker)
    assert worker.calls == [4, 4, 2]
    assert pool.pair_ids == [pair.id for pair in pairs]
    assert pool.complete
    assert sorted(path.name for path in pool.path.glob("*.parquet")) == [
        f"candidates-{start:09d}.parquet" for start in (0, 4, 8)
    ]


@pytest.mark.parametrize("die_at", [0, 1, 2])
def test_a_run_that_stopped_at_any_shard_resumes_to_the_same_pool(tmp_path: Path, die_at: int) -> None:
    pairs = make_pairs(10)
    run(pairs, tmp_path / "whole", Numbered(), Numbered(label="b"))
    with pytest.raises(Killed):
        run(pairs, tmp_path / "pool", Numbered(), Numbered(label="b", die_at=die_at))
    resumed = Numbered()
    run(pairs, tmp_path / "pool", resumed, Numbered(label="b"))
    assert len(resumed.calls) == 3 - die_at
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "pool" / path.name).read_bytes()
    assert not list((tmp_path / "pool").glob("*.part"))


def test_a_finished_pool_is_not_changed(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    run(pairs, tmp_path / "pool", Numbered())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()}
    again = Numbered()
    run(pairs, tmp_path / "pool", again, shard_size=99)
    assert again.calls == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()} == before


def test_a_finished_file_is_reused_unchanged(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    path = run(pairs, tmp_path / "pool", Numbered()).export(tmp_path / "pool.parquet")
    again = Numbered()
    assert len(run(pairs, path, again, shard_size=10)) == 10


_CHILD = """
import os, sys, time
from pathlib import Path

import mmemb.rationales.storage as files
from mmemb.components.workers.corrupting import CorruptingWorker
from mmemb.rationales.generate import generate
from tests.unit.rationales.fakes import Numbered, make_pairs

pool, point = Path(sys.argv[1]), sys.argv[2]
write, rename = files.pq.write_table, os.replace

def here(name):
    if name == point:
        (pool.parent / "here").touch()
        time.sleep(60)

class Slow(Numbered):
    def propose(self, items, k, *, seed):
        found = super().propose(items, k, seed=seed)
        here(f"proposing {len(self.calls)}")
        return found

def half(table, path, **options):
    write(table, path, **options)
    if point == f"writing {path.name[12:21]}":
        os.truncate(path, path.stat().st_size // 2)
        here(point)

def renaming(source, target):
    here(f"renaming {Path(target).name}")
    rename(source, target)

Slow.__qualname__ = "Numbered"
files.pq.write_table, os.replace = half, renaming
workers = [Slow(), CorruptingWorker(Numbered(label="b"))]
generate(make_pairs(40), workers, 3, pool=pool, seed=0, progress=False, shard_size=4)
"""


@pytest.mark.parametrize(
    ("point", "shards", "left"),
    [
        ("renaming manifest.json", 0, ".manifest.json.*.part"),
        ("proposing 5", 4, ""),
        ("writing 000000032", 8, ".candidates-000000032.parquet.*.part"),
    ],
)
def test_a_killed_process_loses_no_finished_shard(tmp_path: Path, point: str, shards: int, left: str) -> None:
    """Kills a run before its manifest exists, while a worker writes, and with half a shard on disk. Then resumes it."""
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(tmp_path / "pool"), point], cwd=root, env=environment)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "here").exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    killed = len(list((tmp_path / "pool").glob("candidates-*.parquet")))
    assert killed == shards
    assert [path.match(left) for path in (tmp_path / "pool").glob("*.part")] == [True] * bool(left)
    for name in ("whole", "pool"):
        workers = (Numbered(), CorruptingWorker(Numbered(label="b")))
        generate(make_pairs(40), workers, 3, pool=tmp_path / name, seed=0, progress=False, shard_size=4)
        if name == "pool":
            assert sum(workers[0].calls) == 40 - 4 * killed
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "pool").iterdir()} == whole


def test_other_data_or_settings_are_refused_with_both_hashes(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    path = tmp_path / "pool"
    manifest = run(pairs, path, Numbered()).manifest
    for changed in (
        lambda: run(make_pairs(11), path, Numbered()),
        lambda: run(pairs[::-1], path, Numbered()),
    ):
        with pytest.raises(ValueError, match=rf"made with other data \(hash {manifest.data}, this run needs"):
            changed()
    for changed in (
        lambda: run(pairs, path, Numbered(label="b")),
        lambda: run(pairs, path, Numbered(), Numbered(label="b")),
        lambda: run(pairs, path, Numbered(), k=4),
        lambda: run(pairs, path, Numbered(), seed=1),
    ):
        with pytest.raises(
            ValueError,
            match="other workers, k, seed, sides or leak check .*delete the pool",
        ):
            changed()


def test_no_pairs_or_no_workers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 pairs and 1 workers"):
        run([], tmp_path / "pool", Numbered())
    with pytest.raises(ValueError, match="3 pairs and 0 workers"):
        run(make_pairs(3), tmp_path / "pool")


@pytest.mark.parametrize("number", [0, -3])
@pytest.mark.parametrize("name", ["k", "shard_size"])
def test_numbers_below_one_are_refused_before_anything_is_written(tmp_path: Path, name: str, number: int) -> None:
    with pytest.raises(ValueError, match=rf"generate\.{name} is {number}; give 1 or more"):
        run(make_pairs(3), tmp_path / "pool", Numbered(), **{name: number})
    assert not (tmp_path / "pool").exists()
    setting = {"k": "candidates"}.get(name, name)
    with pytest.raises(ValueError, match=rf"model\.pool\.{setting} is {number}; give 1 or more"):
        PoolSettings(str(tmp_path / "pool"), **{setting: number})


def test_the_seed_changes_every_sample(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    run(pairs, tmp_path / "a", Numbered(), seed=0)
    run(pairs, tmp_path / "b", Numbered(), seed=1)
    assert rows(tmp_path / "a") != rows(tmp_path / "b")


def test_progress_ends_with_one_line_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = make_pairs(10)
    pool = generate(pairs, [Numbered()], 3, pool=tmp_path / "pool", seed=0, shard_size=4)
    out, err = capsys.readouterr()
    total = sum(len(pool.candidates(pair_id).rationales) for pair_id in pool)
    assert out == ""
    assert f"{total} new candidates, 0 of them flagged as leaks and left out; 0 of 10 pairs already" in err
    generate(pairs, [Numbered()], 3, pool=tmp_path / "pool", seed=0)
    assert (
        "0 new candidates, 0 of them flagged as leaks and left out; 10 of 10 pairs already" in capsys.readouterr().err
    )


def test_progress_prints_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(make_pairs(10), [Numbered()], 3, pool=tmp_path / "pool", seed=0, shard_size=4)
    first, last, summary = capsys.readouterr().err.splitlines()
    assert "generate rationales  0/10 pairs  - pairs/s" in first
    assert "generate rationales  10/10 pairs" in last
    assert "left 0:00:00" in last
    assert "new candidates" in summary


def test_the_settings_name_each_worker(tmp_path: Path) -> None:
    pool = run(make_pairs(4), tmp_path / "pool", Numbered())
    stored = json.loads((pool.path / "manifest.json").read_text())["generation"]
    assert stored == {
        "workers": [{"worker": "Numbered", "label": "a"}],
        "k": 3,
        "seed": 0,
        "sides": ["query"],
        "leaks": LeakCheck().settings,
    }
