"""Every mistake in `mistakes`: exit code 2, one line that names place and remedy, no traceback, nothing left behind."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning  # noqa: F401  (its log keeps the stderr of its import: not that of one test)
import pytest
import yaml
from standins import QUIET

from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.parser import CommandParser
from mmemb.data.datamodule import PairDataModule
from mmemb.inference.embedder import Embedder
from mmemb.interfaces import SetupContext
from mmemb.registry import create
from tests.commands.broken_files import write_items
from tests.commands.mistakes import EMBEDDING, GROUPS, PLAIN, RATIONALES, SETTINGS, TRAINING, Mistake
from tests.integration import small

Answer = Callable[..., str]
ON_ITS_OWN = {"model": {"pooler": "embed_token", "controllers": ["never"], "pool": {"evaluator": "retrieval"}}}
"""With the small settings, all that a command needs without a recipe, which would take longer to read."""


def each(cases: dict[str, Mistake]) -> pytest.MarkDecorator:
    """One test per mistake, with its name."""
    return pytest.mark.parametrize("mistake", cases.values(), ids=list(cases))


@pytest.fixture
def answer(cli: Callable[..., Any]) -> Answer:
    """Makes a mistake, with further words after the command's name; returns the line that answers it."""

    def run(mistake: Mistake, *more: str) -> str:
        mistake.given()
        before = {path for path in Path().rglob("*") if path.is_file()}
        words = shlex.split(mistake.typed)
        name = 2 if words[0] in ("rationales", "data") else 1
        code, _, err = cli(*words[:name], *more, *words[name:])
        assert code == 2, err
        assert "Traceback" not in err
        lines = [line for line in err.split("\n") if line.startswith("mmemb: error: ")]
        assert len(lines) == 1, err
        assert err.rstrip("\n").endswith(lines[0])  # the last thing said, and all of it
        for part in mistake.named:
            assert part in lines[0]
        left = {path for path in Path().rglob("*") if path.is_file()} - before
        assert not [path for path in left if path.suffix in (".ckpt", ".part", ".png")]
        return lines[0]

    return run


@pytest.fixture
def small_run(tmp_path: Path) -> list[str]:
    """Rows, pictures and settings that train; the words that name the settings."""
    small.write_rows(tmp_path)
    settings = small.merged(small.SETTINGS, ON_ITS_OWN)
    Path("small.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", "small.yaml"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of random weights."""
    pooler, backbone = create("pooler", "embed_token"), create("backbone", "tiny", weights="random")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    return Embedder(backbone, pooler).save(tmp_path_factory.mktemp("model"))


def test_a_mistake_is_listed_once() -> None:
    for group, cases in GROUPS.items():
        typed = [(case.typed, case.given) for case in cases.values() if "given.yaml" not in case.typed]
        assert len(set(typed)) == len(typed), group


def test_the_small_settings_work(cli: Callable[..., Any], small_run: list[str]) -> None:
    done = cli("fit", *small_run, "--evaluate=false", "--trainer.max_steps=1")
    assert done.code == 0, done.err


@each(SETTINGS)
def test_in_the_settings_of_a_training(stand_ins: None, answer: Answer, mistake: Mistake) -> None:
    answer(mistake, *QUIET)


@each(TRAINING)
def test_in_a_training_or_its_data(small_run: list[str], answer: Answer, mistake: Mistake) -> None:
    answer(mistake, *small_run)


@each(EMBEDDING)
def test_in_embedding_and_searching(model: Path, answer: Answer, mistake: Mistake) -> None:
    write_items()
    place = "--output" if mistake.typed.startswith("embed") else "--index"
    answer(mistake, "--checkpoint", str(model), place, "all.parquet", "--device", "cpu")
    assert not Path("all.parquet").exists()


@each(RATIONALES)
def test_in_making_rationales(small_run: list[str], answer: Answer, mistake: Mistake) -> None:
    answer(mistake, *small_run)
    assert not Path("pool").exists()


@each(PLAIN)
def test_without_settings(answer: Answer, mistake: Mistake) -> None:
    answer(mistake)
    assert list(Path().iterdir()) == []


CONTENTS = {
    "one.jsonl": '{"id": "secret"}',
    "two.jsonl": '{"id": "secret"}\n{"id": "secret"}',
    "list.json": '[{"id": "secret"}]',
    "cut.json": '{"id": "secret"',
    "binary.parquet": "\udcff\udcfesecret",
    "missing.jsonl": None,
}


@pytest.mark.parametrize(("name", "text"), CONTENTS.items(), ids=list(CONTENTS))
@pytest.mark.parametrize("key", ["train", "validation", "test", "predict"])
def test_a_file_in_place_of_a_list_of_sources_is_not_shown(name: str, text: str | None, key: str) -> None:
    if text is not None:
        Path(name).write_text(text, encoding="utf-8", errors="surrogateescape")
    parser = CommandParser(prog="x")
    parser.add_class_arguments(PairDataModule, "data", sub_configs=True)  # as Lightning does
    for value in (name, f"[{name}]"):
        with pytest.raises(UsageError) as caught:
            parser.parse_args([f"--data.{key}={value}"])
        line = str(caught.value)
        assert "secret" not in line
        if (name, value) == ("list.json", name):  # a list it is, of other objects
            assert all(part in line for part in (f"data.{key}", "'id'", "path"))
        else:
            assert all(part in line for part in (f"data.{key}", "list of sources", "{path: pairs.jsonl}"))
