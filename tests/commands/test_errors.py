"""Every mistake that a command line or a config can hold: one line with place and remedy, exit code 2, no traceback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from mmemb.commands.parsing.errors import explain, guarded
from mmemb.commands.parsing.messages import condense
from mmemb.losses.infonce import InfoNCE

Mistake = Callable[..., str]
Fit = Callable[..., int]


def config(**content: Any) -> str:
    Path("given.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return "--config=given.yaml"


@pytest.mark.parametrize("content", ["", "counterfactual\n"])
def test_a_file_named_like_a_short_name(mistake: Mistake, content: str) -> None:
    Path("random").write_text(content, encoding="utf-8")
    for words in (["--model.selector=random"], [config(model={"selector": "random"})]):
        line = mistake(*words)
        assert "'random' is the short name of a selector, and there is also a file" in line
        assert "rename the file" in line
    assert "short name of a controller" in mistake(config(model={"controllers": ["never", "random"]}))


def test_a_class_path_goes_round_a_file_named_like_a_short_name(fit: Fit) -> None:
    Path("random").write_text("", encoding="utf-8")
    assert fit("--model.selector=mmemb.components.selectors.random.Random", "--trainer.fast_dev_run=true") == 0


def test_an_accelerator_that_is_not_there(mistake: Mistake) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "gpu" in mistake("--trainer.accelerator=gpu")


def test_a_disk_that_is_full_at_the_first_checkpoint(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from mmemb.common import checkpoint

    def full(self: Any, data: Any) -> int:
        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error

    monkeypatch.setattr(checkpoint._Recorder, "write", full)
    line = mistake()
    assert "cannot write the checkpoint" in line
    assert "No space left on device" in line
    assert not [path for path in Path().rglob("*") if path.suffix in (".ckpt", ".part")]


def raised_at(path: Path, error: BaseException) -> BaseException:
    """The error as if the code of a file had raised it."""
    try:
        exec(compile("raise error", str(path), "exec"), {"error": error})
    except BaseException as caught:
        return caught
    raise AssertionError


OURS = Path(__import__("mmemb").__path__[0]) / "data" / "records.py"


def test_only_what_our_code_refused_is_a_mistake(tmp_path: Path) -> None:
    assert explain(raised_at(OURS, ValueError("a.jsonl, line 2:\n no query"))) == "a.jsonl, line 2: no query"
    assert explain(raised_at(tmp_path / "library.py", ValueError("shapes differ"))) is None
    assert explain(raised_at(OURS, RuntimeError("defect"))) is None
    assert explain(raised_at(tmp_path / "library.py", FileNotFoundError(2, "No such file", "a.png"))) == (
        "a.png: No such file"
    )
    assert explain(raised_at(OURS, OSError(28, "cannot write a.ckpt: no space"))) == "cannot write a.ckpt: no space"
    full = explain(raised_at("/lib/tensorboard/writer.py", OSError(28, "No space left on device")))
    assert full == "No space left on device; make room where the run writes, and start it again"
    assert explain(raised_at(OURS, FileNotFoundError("a.jsonl: there is no such file"))) == (
        "a.jsonl: there is no such file"
    )
    assert explain(raised_at(tmp_path / "library.py", ConnectionRefusedError(111, "Connection refused"))) is None


class _Holder:
    """A part that holds another, which may be left out: what the other refuses comes wrapped twice."""

    def __init__(self, infonce: InfoNCE | None = None) -> None:
        self.infonce = infonce


def test_what_a_part_within_a_part_refuses_is_a_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--holder", type=_Holder | None)
    inner = {"class_path": "mmemb.losses.infonce.InfoNCE", "init_args": {"temperature": -1.0}}
    given = parser.parse_object({"holder": {"class_path": f"{__name__}._Holder", "init_args": {"infonce": inner}}})
    assert guarded(lambda: parser.instantiate_classes(given) and 0) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_mistake_found_in_a_loader_process_is_one_line_too(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmemb.commands.parsing.errors._own_folders", lambda: (str(Path(__file__).parent),))
    line = mistake("--data.broken=3", "--data.num_workers=1")
    assert line == "row 3 is broken"


def test_a_full_disk_met_by_tensorboards_writer_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    def writes() -> int:
        monkeypatch.setattr(RecordWriter, "write", full)
        EventFileWriter(str(tmp_path))
        return 0

    assert guarded(writes) == 2
    assert capsys.readouterr().err == (
        "mmemb: error: No space left on device; make room where the run writes, and start it again\n"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_threads_other_errors_keep_their_traceback() -> None:
    met: list[BaseException | None] = []
    failing = threading.Thread(target=lambda: [][1])

    def runs() -> int:
        failing.start()
        failing.join()
        return 0

    before, threading.excepthook = threading.excepthook, lambda failed: met.append(failed.exc_value)
    try:
        assert guarded(runs) == 0
    finally:
        threading.excepthook = before
    assert [type(error) for error in met] == [IndexError]


def test_a_defect_keeps_its_traceback(fit: Fit) -> None:
    with pytest.raises(ValueError, match="row 3 is broken"):
        fit("--data.broken=3")  # raised by code that is not ours


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]) -> None:
    def fails() -> int:
        raise FileNotFoundError(2, "No such file", "a")

    assert guarded(fails) == 2
    with pytest.raises(FileNotFoundError):
        guarded(fails, debug=True)
    monkeypatch.setenv("MMEMB_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        guarded(fails)


def test_an_unknown_message_is_at_least_one_line() -> None:
    assert condense("something\n  new", None, []) == "something new"
