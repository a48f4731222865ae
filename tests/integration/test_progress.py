"""`mmemb fit > log 2>&1`: the log has plain lines of the whole run, and so has the file in the run's folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.small import write_rows, write_settings

pytestmark = pytest.mark.slow
COUNTED = re.compile(
    r"(.+?)  (\d+)(/\d+)? (\w+)  (-|[\d.,]+) \4/s  past \d+:\d\d:\d\d  left (-|\d+):[-\d]+:[-\d]+  [\d,]+ MB"
)
TRAINED = re.compile(
    r"(\w+)  step (\d+)/4 \(phase (\d+)/(\d+)\)  loss (-|\d+\.\d+)  (-|[\d.]+) steps/s  left \S+  [\d,]+ MB"
)


def test_a_log_file_has_steady_lines_of_every_part_of_the_run(tmp_path: Path) -> None:
    write_rows(tmp_path)
    changes = {
        "trainer": {"enable_progress_bar": True, "max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1},
        "model": {
            "phases": [
                {"objective": {"joint": {"chunk_size": 4}}, "steps": 3},
                {"objective": "control", "data": "more"},
            ],
            "validation_queries": 2,
        },
        "data": {"streams": {"more": {"sources": [{"path": "pairs.jsonl"}], "batch_size": 8, "sub_batch_size": 4}}},
    }
    words = write_settings(tmp_path, changes)
    command = [str(Path(sys.executable).with_name("mmemb")), "fit", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MMEMB_PROGRESS_SECONDS": "0"}
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=280, check=False
        )
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert done.returncode == 0, text[-3000:]
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert all(line.isprintable() for line in lines)

    trained = [match.groups() for line in lines if (match := TRAINED.fullmatch(line[9:]))]
    assert [each[:4] for each in trained] == [
        ("joint", "0", "0", "3"),
        ("joint", "1", "1", "3"),
        ("joint", "2", "2", "3"),
        ("joint", "3", "3", "3"),
        ("control", "3", "0", "1"),
        ("control", "4", "1", "1"),
    ]
    assert [each[4] == "-" for each in trained] == [True, False, False, False, True, False]
    assert "-" not in {each[5] for each in trained[2:4]}

    counted = [match.groups() for line in lines if (match := COUNTED.fullmatch(line[9:]))]
    titles = {each[0] for each in counted}
    assert {"generate rationales", "evaluate", "evaluate colour: encode", "validation", "test"} <= titles
    assert {"test: calibrate capital: think and encode", "test: evaluate colour: think and encode"} <= titles
    others = [line for line in lines if not TRAINED.fullmatch(line[9:]) and not COUNTED.fullmatch(line[9:])]
    assert all(re.match(r"validation  step \d  never/hit@1 0\.\d{3}", line[9:]) for line in others), others
    assert len(others) == 2

    kept = (tmp_path / "runs" / "r1+small" / "version_0" / "progress.log").read_text(encoding="utf-8").splitlines()
    assert [line for line in kept if " pool: " not in line] == lines
