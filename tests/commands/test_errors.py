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
from standins import StandInModule

from mmemb.commands.parsing.errors import UsageError, explain, guarded
from mmemb.commands.parsing.messages import condense
from mmemb.commands.parsing.parser import CommandParser
from mmemb.data.datamodule import PairDataModule
from mmemb.losses.infonce import InfoNCE

Mistake = Callable[..., str]
Fit = Callable[..., int]


def config(**content: Any) -> str:
    Path("given.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return "--config=given.yaml"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model.selector", "conterfactual"], ["model.selector: ", "did you mean 'counterfactual'?", "random"]),
        (["--model.selector", "embed_token"], ["no selector named 'embed_token': that is a pooler", "Registered: "]),
        (["--model.selector=random", "--model.selector.seed=abc"], ["model.selector.seed: expected int, got 'abc'"]),
        (["--model.selector=random", "--model.selector.sed=4"], ["no argument 'sed'; did you mean 'seed'?"]),
        (["--model.selector.seed=3"], ["model.selector: ", "is abstract", "mmemb components"]),
        (
            ["--model.selector=counterfactual", "--model.selector.temperature=-1"],
            ["temperature is -1.0; give a"],
        ),
        (["--model.selector=none.Such"], ["'none.Such' cannot be imported", "PYTHONPATH"]),
        (["--model.width=wide"], ["model.width: expected int, got 'wide'"]),
        (["--model.widht=3"], ["there is no option '--model.widht'; did you mean '--model.width'?"]),
        (["--config=none.yaml"], ["there is no config file none.yaml"]),
        (["--ckpt_path=none.ckpt"], ["none.ckpt: ", "--ckpt_path"]),
        (["--model.selector.help=conterfactual"], ["did you mean 'counterfactual'?"]),
        (["--config"], ["--config", "expected one argument"]),
    ],
)
def test_flags(mistake: Mistake, words: list[str], parts: list[str]) -> None:
    line = mistake(*words)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"modle": {"width": 3}}, ["no setting 'modle.width'; did you mean 'model.width'?"]),
        ({"trainer": {"precison": "bf16"}}, ["'trainer.precison'; did you mean 'trainer.precision'?"]),
        ({"trainer": {"max_steps": "many"}}, ["trainer.max_steps: expected int, got 'many'"]),
        ({"model": {"selector": "nope"}}, ["model.selector: there is no selector named 'nope'"]),
        ({"model": {"selector": 3}}, ["expected the short name or class path of a Selector, got '3'"]),
        ({"model": {"controllers": ["never", "thresold"]}}, ["model.controllers: ", "did you mean 'threshold'?"]),
        (
            {"model": {"selector": {"class_path": "random", "init_args": {"seed": "x"}}}},
            ["seed: expected int, got 'x'"],
        ),
        (
            {"model": {"selector": {"class_path": "random", "init_args": {"sed": 1}}}},
            ["no argument 'sed'", "takes seed"],
        ),
        ({"model": {"selector": "mmemb.components.selectors.random.Rndom"}}, ["Rndom' cannot be imported"]),
        ({"model": {"optimizer": "torch.optim.AdmW"}}, ["model.optimizer: ", "no attribute 'AdmW'"]),
        ({"model": {"optimizer": "AdmW"}}, ["'AdmW' is not a known class", "dotted path"]),
        (
            {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": "fast"}}}},
            ["model.optimizer.lr: expected float, got 'fast'"],
        ),
        ({"model": {"selector": "mmemb.components.controllers.never.Never"}}, ["model.selector: ", "Selector"]),
    ],
)
def test_configs(mistake: Mistake, content: dict[str, Any], parts: list[str]) -> None:
    line = mistake(config(**content))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [a", "given.yaml, line 1: not valid YAML"),
        ("a: 1\nb: :\n  - c: [", "given.yaml, line"),
        ("- a\n- b", "given.yaml: a config is a mapping (`model: ...`), not list"),
        ("", "given.yaml: a config is a mapping (`model: ...`), not NoneType"),
    ],
)
def test_config_files(mistake: Mistake, text: str, part: str) -> None:
    Path("given.yaml").write_text(text, encoding="utf-8")
    assert part in mistake("--config=given.yaml")


def test_a_binary_config(mistake: Mistake) -> None:
    Path("given.yaml").write_bytes(b"\xff\xfe\x00")
    assert "given.yaml: not valid YAML" in mistake("--config=given.yaml")


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


def test_a_checkpoint_of_another_backbone(fit: Fit, mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmemb.common.checkpoint import refuse_other_backbone

    def refuse(self: StandInModule, checkpoint: dict[str, Any]) -> None:
        refuse_other_backbone(checkpoint, identity=self.identity)

    monkeypatch.setattr(StandInModule, "on_load_checkpoint", refuse)
    assert fit("--model.identity=tiny-1") == 0
    line = mistake("--model.identity=tiny-2", "--ckpt_path=runs/default/version_0/checkpoints/last.ckpt")
    assert "'tiny-1'" in line
    assert "'tiny-2'" in line


def test_a_file_that_is_no_checkpoint(mistake: Mistake) -> None:
    Path("a.ckpt").write_bytes(b"not a checkpoint")
    assert "a.ckpt cannot be read as a checkpoint" in mistake("--ckpt_path=a.ckpt")


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.jsonl", '{"id": "secret"}'),
        ("two.jsonl", '{"id": "secret"}\n{"id": "secret"}'),
        ("list.json", '[{"id": "secret"}]'),
        ("cut.json", '{"id": "secret"'),
        ("binary.parquet", "\udcff\udcfesecret"),
        ("missing.jsonl", None),
    ],
)
@pytest.mark.parametrize("key", ["train", "control", "validation", "test", "predict"])
def test_a_file_in_place_of_a_list_of_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text, encoding="utf-8", errors="surrogateescape")
    parser = CommandParser(prog="x")
    parser.add_class_arguments(PairDataModule, "data", sub_configs=True)  # as Lightning does
    for value in (name, f"[{name}]"):
        with pytest.raises(UsageError) as caught:
            parser.parse_args([f"--data.{key}={value}"])
        assert "secret" not in str(caught.value)
        if (name, value) == ("list.json", name):
            assert "Source has no argument 'id' (it takes path, " in str(caught.value)  # a list it is, of other objects
        else:
            assert str(caught.value) == f"data.{key}: expected a list of sources, such as [{{path: pairs.jsonl}}]"


def test_a_mistake_within_a_source_is_named() -> None:
    parser = CommandParser(prog="x")
    parser.add_class_arguments(PairDataModule, "data", sub_configs=True)
    with pytest.raises(UsageError, match="no argument 'paht'; did you mean 'path'"):
        parser.parse_args(["--data.train=[{paht: a.jsonl}]"])
    with pytest.raises(UsageError, match="limit: expected int, got 'few'"):
        parser.parse_args(["--data.train=[{path: a.jsonl, limit: few}]"])


def test_an_unknown_message_is_at_least_one_line() -> None:
    assert condense("something\n  new", None, []) == "something new"
