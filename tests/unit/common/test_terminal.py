"""Progress reports with a fake clock and stream: pace, fields and nesting. Only a terminal has bars."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from mmemb.common import terminal
from mmemb.common.terminal import Output, progress, say, using


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines(stream: io.StringIO) -> list[str]:
    """Returns the written lines without their time of day. Fails if a line has none."""
    found = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in found), found
    return [line[9:] for line in found]


def shown(stream: io.StringIO) -> str:
    """Returns the text that a terminal shows, without escape codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_lines_come_at_the_start_at_the_end_and_at_most_every_thirty_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with progress("read", 100, unit="pairs", to=Output(out, clock=clock)) as bar:
        for _ in range(100):
            clock.now += 1
            bar.advance(1)
    assert [line.split()[1] for line in lines(out)] == ["0/100", "30/100", "60/100", "90/100", "100/100"]


def test_a_line_has_all_fields(clock: Clock) -> None:
    out = io.StringIO()
    with progress("score", 3000, unit="pairs", done=1000, to=Output(out, clock=clock)) as bar:
        clock.now += 50
        bar.advance(500)
        bar.reach(3000)
    first, middle, last = lines(out)
    assert re.fullmatch(r"score  1,000/3,000 pairs  - pairs/s  past 0:00:00  left -:--:--  [\d,]+ MB", first)
    # 1,000 were done before, so the rate is that of the other 500.
    fields = r"score  1,500/3,000 pairs  10\.0 pairs/s  past 0:00:50  left 0:02:30  [\d,]+ MB"
    assert re.fullmatch(fields, middle)
    assert "3,000/3,000 pairs  40.0 pairs/s  past 0:00:50  left 0:00:00" in last


def test_without_a_total_there_is_no_remaining_time(clock: Clock) -> None:
    out = io.StringIO()
    with progress("read", None, unit="rows", to=Output(out, clock=clock)) as bar:
        clock.now += 3700
        bar.advance(37)
    assert "read  37 rows  0.01 rows/s  past 1:01:40  left -:--:--" in lines(out)[-1]


def test_inner_work_writes_a_line_only_when_one_is_due(clock: Clock) -> None:
    out = io.StringIO()
    with using(Output(out, clock=clock)), progress("test", 2, unit="tasks") as outer:
        outer.about("test colour")
        for _ in range(2):
            with progress("encode", 4, unit="items") as inner:
                for _ in range(4):
                    clock.now += 10
                    inner.advance()
            outer.advance()
    assert [line.rsplit("  ", 4)[0] for line in lines(out)] == [
        "test  0/2 tasks",
        "test colour: encode  3/4 items",
        "test colour: encode  2/4 items",
        "test colour  2/2 tasks",
    ]


def test_a_failure_writes_no_last_line(clock: Clock) -> None:
    out = io.StringIO()
    where = Output(out, clock=clock)
    with pytest.raises(ZeroDivisionError), progress("read", 2, unit="rows", to=where) as bar:
        bar.advance(1 // 0)
    assert len(lines(out)) == 1
    assert where.bars == []


def test_lines_have_no_control_characters(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    with progress("a\x1b[31m\nb\r", 1, unit="rows", to=Output(out, clock=clock)) as bar:
        bar.advance(1)
    say("one\x1b[2K\ntwo")
    for text in (out.getvalue(), capsys.readouterr().err):
        assert all(line.isprintable() for line in text.splitlines())
    assert len(lines(out)) == 2


def test_a_terminal_has_a_bar_and_no_lines(clock: Clock) -> None:
    out = Terminal()
    with progress("slow", 100, unit="pairs", done=20, to=Output(out, clock=clock)) as bar:
        for _ in range(2):
            clock.now += 100
            bar.advance(20)
    last = [line for line in shown(out).splitlines() if line.strip()][-1]
    for field in ("slow", "60/100", "0.2 pairs/s", "0:03:20", "left 0:03:20"):
        assert field in last
    assert " MB" not in shown(out)


def test_inner_work_is_a_row_of_the_bar(clock: Clock) -> None:
    out = Terminal()
    with using(Output(out, clock=clock)), progress("outer", 5, unit="tasks"):
        with progress("inner", 7, unit="items") as inner:
            inner.advance(3)
            assert inner._display is not None
            inner._display.refresh()
        assert "3/7" in shown(out)
        assert inner._display is None


def test_there_is_no_bar_during_another_live_display(clock: Clock) -> None:
    out = Terminal()
    with Progress(), progress("quiet", 3, unit="items", to=Output(out, clock=clock)) as bar:
        bar.advance(3)
    assert out.getvalue() == ""
    with progress("seen", 3, unit="items", to=Output(out, clock=clock)):
        pass
    assert "seen" in out.getvalue()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_redraw_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setenv("TERM", term)
    out = Terminal()
    with progress("read", 1, unit="rows", to=Output(out, clock=clock)):
        pass
    assert len(lines(out)) == 1


def test_the_file_gets_the_lines_with_any_stream(tmp_path: Path, clock: Clock) -> None:
    out = Terminal()
    for stream, show in ((out, True), (io.StringIO(), False)):
        where = Output(stream, show=show, file=tmp_path / "run" / "progress.log", clock=clock)
        with using(where), progress("read", 1, unit="rows") as bar:
            bar.advance(1)
            say("said")
        if not show:
            assert stream.getvalue() == ""
    kept = (tmp_path / "run" / "progress.log").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in kept] == ["read", "said", "read"] * 2


def test_nothing_is_reported_when_disabled_or_on_another_rank(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    with progress("read", 1, unit="rows", show=False, to=Output(out, clock=clock)) as bar:
        bar.advance(1)
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with progress("read", 1, unit="rows", to=Output(out, clock=clock)) as bar:
                bar.advance(1)
            Output(out, clock=clock).write("line")
            say("line")
    assert out.getvalue() == ""
    assert capsys.readouterr().err == ""


def test_the_pace_is_set_by_a_variable(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setenv(terminal.INTERVAL, "2")
    with progress("read", 4, unit="rows", to=Output(out, clock=clock)) as bar:
        for _ in range(3):
            clock.now += 1
            bar.advance(1)
    assert [line.split()[1] for line in lines(out)] == ["0/4", "2/4", "3/4"]
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv(terminal.INTERVAL, wrong)
        with pytest.raises(ValueError, match=f"MMEMB_PROGRESS_SECONDS is '{wrong}'"):
            terminal.interval()


def test_the_memory_is_that_of_the_process() -> None:
    held = bytearray(b"x") * 300_000_000  # written to, so that it is in physical memory
    before = float(terminal.memory().split(" MB")[0].replace(",", ""))
    del held
    after = float(terminal.memory().split(" MB")[0].replace(",", ""))
    assert before - after == pytest.approx(300, abs=30)


def test_importing_the_module_is_cheap() -> None:
    code = "import sys, mmemb.common.terminal; assert not {'rich', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tables_have_a_line_per_row_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table_console().print("word " * 200)
    assert len(capsys.readouterr().out.splitlines()) == 1
