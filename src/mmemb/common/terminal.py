"""Progress and messages: a bar on a terminal, plain lines at a steady pace everywhere else.

Every long piece of work of every command reports through `progress`. On a terminal it shows a bar. In a file or a pipe
it writes a line at the start, at the end, and in between at most every 30 seconds:

    12:03:41 generate rationales  512/3,000 pairs  12.5 pairs/s  past 0:00:41  left 0:03:19  1,204 MB

Lines hold no control characters. Work inside other work adds a row to the bar, or a line whenever one is due; its title
follows the outer one (``test: evaluate colour: encode``). Only rank 0 of a distributed run reports.

Where lines go is the process's current `Output`; `using` replaces it for a while, for example by one that also writes
the log file of a training run. Importing this module imports neither rich nor torch.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

INTERVAL = "MMEMB_PROGRESS_SECONDS"
"""Environment variable: the least number of seconds between two plain lines of running work."""
_SECONDS = 30.0
_WIDEST = 10_000
"""Characters of a table's line where no terminal limits them; no name comes near."""


def interval() -> float:
    """Seconds between two plain lines: `MMEMB_PROGRESS_SECONDS`, or 30.

    Raises:
        ValueError: the variable is not a number from 0 on.
    """
    given = os.environ.get(INTERVAL)
    seconds = _SECONDS
    if given:
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
    if not seconds >= 0:
        raise ValueError(f"{INTERVAL} is {given!r}; give the seconds between two progress lines, 0 or more")
    return seconds


def has_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def is_first_rank() -> bool:
    """Whether this process is rank 0, as torch, torchrun, SLURM or Lightning's launcher says; True when alone."""
    distributed: Any = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


# -- parts of a line -------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """The text on one line, without control characters."""
    return "".join(character if character.isprintable() else " " for character in text)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, such as ``0:02:58``; ``-:--:--`` where they are not known yet."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def speed(rate: float | None, unit: str) -> str:
    """Such as ``12.5 pairs/s``; ``- pairs/s`` where the rate is not known yet."""
    shown = "-" if rate is None else f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"
    return f"{shown} {unit}/s"


def memory() -> str:
    """Resident memory of this process in MB (10^6 bytes), and what torch reserves on the GPU where one is in use."""
    shown = f"{_resident_bytes() / 1e6:,.0f} MB"
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        shown += f", GPU {cuda.memory_reserved() / 1e6:,.0f} MB"
    return shown


def _resident_bytes() -> int:
    """What the process holds now; where the system does not say, the largest amount it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource

        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return held if sys.platform == "darwin" else 1024 * held


# -- where it goes ---------------------------------------------------------------------------------------------------


class Output:
    """Where progress is reported.

    Args:
        stream: gets the bar if it is a terminal, otherwise plain lines; None: standard error at the time of writing.
        show: whether the stream gets anything.
        file: gets every plain line too, whatever the stream gets; it is appended to and made when first needed.
        every: least seconds between two lines of running work; None: `interval`.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        show: bool = True,
        file: Path | None = None,
        every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self.show = show
        self.file = file
        self.clock = clock
        self.bars: list[Bar] = []
        self._every = every
        self._last = -math.inf

    @property
    def stream(self) -> TextIO:
        """The stream as it is now."""
        return sys.stderr if self._stream is None else self._stream

    @property
    def is_live(self) -> bool:
        """Whether bars are shown here, not lines."""
        return self.show and has_terminal(self.stream)

    def is_due(self) -> bool:
        """Whether the last line is long enough ago for another one."""
        every = interval() if self._every is None else self._every
        return self.clock() - self._last >= every

    def write(self, text: str) -> None:
        """Writes a line with the time of day to the file, and to the stream unless it shows bars; rank 0 only."""
        self._last = self.clock()
        if not is_first_rank():
            return
        line = f"{time.strftime('%H:%M:%S')} {plain(text)}\n"
        if self.show and not self.is_live:
            self.stream.write(line)
            self.stream.flush()
        self.keep(line)

    def keep(self, line: str) -> None:
        """Appends a whole line to the file, if there is one."""
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line)


_outputs = [Output()]
"""The last one is in use. A process has one terminal, so this is the process's state, as in `logging`."""


def output() -> Output:
    """The output in use."""
    return _outputs[-1]


@contextmanager
def using(other: Output) -> Iterator[Output]:
    """Reports to another output inside."""
    _outputs.append(other)
    try:
        yield other
    finally:
        _outputs.remove(other)


# -- progress --------------------------------------------------------------------------------------------------------


class Bar:
    """The progress of one piece of work; made by `progress`.

    Attributes:
        title: what is done.
        total: how much there is; None where that is unknown.
        done: how much of it is done.
    """

    def __init__(self, title: str, total: int | None, *, unit: str, done: int, output: Output | None) -> None:
        self.title, self.total, self.done = title, total, done
        self._unit = unit
        self._found = done
        self._output = output
        self._began = 0.0 if output is None else output.clock()
        self._told: int | None = None
        self._display: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, count: int = 1) -> None:
        """Reports that so many more are done."""
        self.reach(self.done + count)

    def reach(self, done: int) -> None:
        """Reports that so many are done in all."""
        self.done = done
        if self._output is None:
            return
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=done)
        finished_before = self.total is not None and self._told == done >= self.total
        if self._output.is_due() and not finished_before:
            self.tell()

    def about(self, title: str) -> None:
        """Changes what the work is called."""
        self.title = title
        if self._display is not None and self._task is not None:
            self._display.update(self._task, description=title)

    def tell(self) -> None:
        """Writes a line now."""
        if self._output is None:
            return
        self._told = self.done
        past = self._output.clock() - self._began
        moved = self.done - self._found
        rate = moved / past if moved > 0 and past > 0 else None
        left = None
        if self.total is not None and self.done >= self.total:
            left = 0.0
        elif self.total is not None and rate is not None:
            left = (self.total - self.done) / rate
        of = "" if self.total is None else f"/{self.total:,}"
        bars = self._output.bars
        titles = [bar.title for bar in bars[: bars.index(self) + 1]]
        self._output.write(
            f"{': '.join(titles)}  {self.done:,}{of} {self._unit}  {speed(rate, self._unit)}  "
            f"past {duration(past)}  left {duration(left)}  {memory()}"
        )

    @contextmanager
    def _shown(self, outer: Bar | None) -> Iterator[None]:
        """Shows the bar inside: a row of the outer work's display, or a display of its own; none where none fits."""
        made = None
        if outer is not None:
            self._display = outer._display
        elif self._output is not None and self._output.is_live and _is_free():
            self._display = made = _display(self._output, self._unit)
            made.start()
        if self._display is None:
            yield
            return
        # Total None would be a bar that pulses; the rate is taken between two looks, of which this is the first.
        self._task = self._display.add_task(self.title, total=self.total, completed=self.done, unit=self._unit)
        self._display.advance(self._task, 0)
        try:
            yield
        finally:
            if made is not None:
                made.stop()
            else:
                self._display.remove_task(self._task)
            self._display = self._task = None


@contextmanager
def progress(
    title: str, total: int | None, *, unit: str, done: int = 0, show: bool = True, to: Output | None = None
) -> Iterator[Bar]:
    """Reports the work done inside, as the module's docstring says.

    Args:
        title: what is done.
        total: how much there is to do; None where that is unknown.
        unit: what is counted, in the plural, such as ``pairs``.
        done: how much an earlier run had done; it does not count in the rate.
        show: False reports nothing.
        to: where; None: the output in use.
    """
    if not show or not is_first_rank():
        yield Bar(title, total, unit=unit, done=done, output=None)
        return
    where = to or output()
    outer = where.bars[-1] if where.bars else None
    bar = Bar(title, total, unit=unit, done=done, output=where)
    where.bars.append(bar)
    try:
        if outer is None or where.is_due():
            bar.tell()
        with bar._shown(outer):
            yield bar
        if outer is None and bar._told != bar.done:
            bar.tell()
    finally:
        where.bars.remove(bar)


def _is_free() -> bool:
    """Whether no other live display owns the terminal: a trainer's bar, on rich's shared console."""
    from rich import get_console
    from rich.errors import LiveError
    from rich.live import Live

    console = get_console()
    try:
        first = console.set_live(Live(console=console))
    except LiveError:  # before rich 14.1, which has no display inside another one
        return False
    console.clear_live()
    return first is not False


def _display(where: Output, unit: str) -> Progress:
    """A bar with what is done of how much, the time, the rate and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units per second."""

        def render(self, task: Task) -> Text:
            shown = speed(task.speed, task.fields.get("unit", unit)) if task.speed else ""
            return Text(shown, style="progress.data.speed")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns,
        console=Console(file=where.stream, force_terminal=True),
        transient=True,
        # Over the whole run: one step may take longer than the half minute over which a rate is taken by default.
        speed_estimate_period=math.inf,
        get_time=where.clock,
    )


# -- messages and tables ---------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Prints one line for the person at the terminal, on standard error; a run's log file gets it too. Rank 0 only."""
    if not is_first_rank():
        return
    # A bar that is up redirects standard error and prints the line above itself.
    print(plain(line), file=sys.stderr, flush=True)
    output().keep(f"{time.strftime('%H:%M:%S')} {plain(line)}\n")


def table_console() -> Console:
    """A console for tables on standard output; in a file or a pipe, which has no width, each row is one line."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDEST
    return console
