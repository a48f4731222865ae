"""The build tool with tiny replacements for its five npm archives and for the program that draws SVG."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_bundled", ROOT / "tools" / "build_bundled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def drawn(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the renderer by one that draws a purple picture. Collects the SVG texts given to it."""
    monkeypatch.setattr(tool, "MISNAMED", {("streamline", "cat")})
    texts: list[str] = []

    def svg_to_bytes(*, svg_string: str) -> bytes:
        texts.append(svg_string)
        return png("purple")

    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=svg_to_bytes))
    return texts


def archive(name: str, version: str) -> str:
    """Returns the file name that `npm pack` uses."""
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def emoji(image: str, sub: str, order: int, unified: str = "") -> dict[str, Any]:
    return {"image": image, "subcategory": sub, "sort_order": order, "unified": unified}


def png(colour: str, side: int = 64) -> bytes:
    out = io.BytesIO()
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    picture.paste(Image.new("RGBA", (side // 2, side), colour), (0, 0))
    picture.save(out, "PNG")
    return out.getvalue()


def pack(path: Path, files: dict[str, Any]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


ENGLISH = SimpleNamespace(
    territories={"CL": "Chile", "TD": "Chad", "RO": "Romania", "005": "South America", "017": "Middle Africa"},
    currencies={"CLP": "Chilean Peso", "XAF": "Central African CFA Franc"},
    languages={"es": "Spanish", "fr": "French", "ar": "Arabic"},
)


@pytest.fixture(scope="module")
def packages(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives with animals, a face and flags. Some of them lack a second picture or look like another one."""
    folder = tmp_path_factory.mktemp("npm")
    table = [
        emoji("1f431.png", "animal-mammal", 2),
        emoji("1f436-fe0f.png", "animal-mammal", 1),
        emoji("1f439.png", "animal-mammal", 3),
        emoji("1f43b.png", "animal-mammal", 4),
        emoji("1f600.png", "face-smiling", 5),
        emoji("1f1f9-1f1e9.png", "country-flag", 6, "1F1F9-1F1E9"),
        emoji("1f1e8-1f1f1.png", "country-flag", 7, "1F1E8-1F1F1"),
        emoji("1f1fa-1f1f3.png", "country-flag", 8, "1F1FA-1F1F3"),
    ]
    colours = {"1f431": "red", "1f436-fe0f": "blue", "1f43b": "red", "1f1f9-1f1e9": "green", "1f1e8-1f1f1": "yellow"}
    google = {f"img/google/64/{key}.png": png(colour) for key, colour in colours.items()}
    google["img/google/64/1f439.png"] = png("black")
    twitter = {f"img/twitter/64/{key}.png": png(colour, 72) for key, colour in colours.items()}
    labels = {"1F431": "Cat", "1F436": "Dog", "1F439": "hamster", "1F43B": "bear", "1F600": "grinning face"}
    currency = {
        "CL": [{"CLE": {"_from": "1960-01-01", "_to": "1975-09-29"}}, {"CLP": {"_from": "1975-09-29"}}],
        "TD": [{"XAF": {"_from": "1993-01-01"}}],
    }
    info = {
        "CL": {"languagePopulation": {"es": {"_populationPercent": "96", "_officialStatus": "official"}}},
        "TD": {
            "languagePopulation": {
                "fr": {"_populationPercent": "20", "_officialStatus": "official"},
                "ar": {"_populationPercent": "9", "_officialStatus": "official"},
                "sba": {"_populationPercent": "60"},
            }
        },
    }
    containment = {
        "005": {"_contains": ["CL"]},
        "017": {"_contains": ["TD"]},
        "UN": {"_contains": ["CL", "TD"], "_grouping": "true"},
    }
    contents: dict[str, dict[str, Any]] = {
        "emoji-datasource-google": {"emoji.json": table} | google,
        "emoji-datasource-twitter": twitter,
        "emojibase-data": {"en/data.json": [{"hexcode": key, "label": label} for key, label in labels.items()]},
        "cldr-core": {
            "supplemental/currencyData.json": {"supplemental": {"currencyData": {"region": currency}}},
            "supplemental/territoryInfo.json": {"supplemental": {"territoryInfo": info}},
            "supplemental/territoryContainment.json": {"supplemental": {"territoryContainment": containment}},
        },
        tool.STYLES["fluent"]: {
            # The cat has a picture, the dog has an alias of one, and the countries have none.
            "chars.json": {"1f431": "cat", "1f436": "puppy", "1f9ff": "amulet"},
            "icons.json": {
                "icons": {"cat": {"body": "<cat/>"}, "dog": {"body": "<dog/>"}, "amulet": {"body": "<amulet/>"}},
                "aliases": {"puppy": {"parent": "dog"}},
            },
        },
        # Pictures without code points are found by name.
        tool.STYLES["emojione"]: {
            "chars.json": {},
            "icons.json": {
                "icons": {"d-og": {"body": "<hound/>"}, "chad": {"body": "<flag/>"}},
                "width": 64,
                "height": 32,
            },
        },
        tool.STYLES["fxemoji"]: {"chars.json": {}, "icons.json": {"icons": {"horse": {"body": "<horse/>"}}}},
        tool.STYLES["fluent-color"]: {"chars.json": {}, "icons.json": {"icons": {}}},
        # The cat of this style is known to show another thing.
        tool.STYLES["streamline"]: {"chars.json": {}, "icons.json": {"icons": {"cat": {"body": "<cart/>"}}}},
    }
    for name, files in contents.items():
        pack(folder / archive(name, tool.PACKAGES[name]), files)
    return folder


def test_entities_are_those_with_two_distinguishable_pictures(tool: ModuleType, packages: Path) -> None:
    content, pictures = tool.build(tool.fetch(packages), ENGLISH)
    # The hamster lacks a second picture, the bear looks like the cat, the grin is no thing, the union is no country.
    assert {key: entity["name"] for key, entity in content["entities"].items()} == {
        "1f436": "dog",
        "1f431": "cat",
        "1f1f9-1f1e9": "chad",
        "1f1e8-1f1f1": "chile",
    }
    by_vendors = [f"{vendor}/{key}.webp" for vendor in tool.VENDORS for key in content["entities"]]
    further = ["fluent/1f431.webp", "fluent/1f436.webp", "emojione/1f436.webp"]
    assert sorted(pictures) == sorted([*by_vendors, *further])


def test_further_styles_have_pictures_of_kept_emoji_only(tool: ModuleType, packages: Path, drawn: list[str]) -> None:
    content, _ = tool.build(tool.fetch(packages), ENGLISH)
    assert sorted(svg[svg.index("><") + 1 : -len("</svg>")] for svg in drawn) == ["<cat/>", "<dog/>", "<hound/>"]
    assert 'viewBox="0 0 64 32"' in next(svg for svg in drawn if "<hound/>" in svg)
    styles = {entity["name"]: entity.get("styles") for entity in content["entities"].values()}
    assert styles == {"dog": ["fluent", "emojione"], "cat": ["fluent"], "chad": None, "chile": None}


def test_country_facts_are_current_and_official(tool: ModuleType, packages: Path) -> None:
    content, _ = tool.build(tool.fetch(packages), ENGLISH)
    facts = {entity["name"]: entity.get("attributes") for entity in content["entities"].values()}
    assert facts["chile"] == {"currency": "chilean peso", "language": "spanish", "region": "south america"}
    assert facts["chad"] == {"currency": "central african cfa franc", "language": "french", "region": "middle africa"}


def test_pictures_have_one_size_and_a_white_background(tool: ModuleType) -> None:
    for side in (64, 72):
        with Image.open(io.BytesIO(tool.picture(png("red", side)))) as picture:
            assert picture.size == (64, 64)
            pixels = picture.convert("RGB")
            left, right = pixels.getpixel((8, 32)), pixels.getpixel((56, 32))
        assert isinstance(left, tuple)
        assert isinstance(right, tuple)
        assert left[0] > 200 > 60 > left[1]
        assert min(right) > 240


def test_two_builds_write_the_same_bytes(tool: ModuleType, packages: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        size = tool.write(tmp_path / name, *tool.build(tool.fetch(packages), ENGLISH))
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == ["entities.json", "pictures.zip"]
        assert sum(file.stat().st_size for file in files) == size
    for name in ("entities.json", "pictures.zip"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with zipfile.ZipFile(tmp_path / "a" / "pictures.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_data_set_that_is_too_large_is_refused_and_not_written(
    tool: ModuleType, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "LIMIT_BYTES", 100)
    with pytest.raises(ValueError, match=r"would take \d+ bytes, .*100"):
        tool.write(tmp_path / "out", *tool.build(tool.fetch(packages), ENGLISH))
    assert not (tmp_path / "out").exists()


def test_command_writes_into_the_given_folder(
    tool: ModuleType,
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "babel", SimpleNamespace(Locale=lambda name: ENGLISH))
    assert tool.main(["--packages", str(packages), "--output", str(tmp_path)]) == 0
    assert "2 emoji, 2 flags, 11 pictures" in capsys.readouterr().out
    assert json.loads((tmp_path / "entities.json").read_text())["sources"] == tool.PACKAGES


@pytest.mark.parametrize("library", ["babel", "resvg_py"])
def test_command_names_the_missing_library(
    library: str,
    tool: ModuleType,
    packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "babel", SimpleNamespace(Locale=lambda name: ENGLISH))
    monkeypatch.setitem(sys.modules, library, None)
    assert tool.main(["--packages", str(packages)]) == 2
    assert f"{library} is not installed; run pip install 'mmemb[tools]'" in capsys.readouterr().err


def test_missing_archives_are_fetched_by_name_and_version(
    tool: ModuleType, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str], *, cwd: Path, **rest: Any) -> None:
        asked.append(command)
        name, _, version = command[-1].rpartition("@")
        (cwd / archive(name, version)).write_bytes((packages / archive(name, version)).read_bytes())

    monkeypatch.setattr(tool.subprocess, "run", run)
    assert set(tool.fetch(tmp_path)) == set(tool.PACKAGES)
    assert asked == [["npm", "pack", f"{name}@{version}"] for name, version in tool.PACKAGES.items()]
    asked.clear()
    tool.fetch(tmp_path)
    assert asked == []


def test_currency_is_the_first_that_has_not_ended(tool: ModuleType) -> None:
    entries = [{"AAA": {"_from": "1990-01-01", "_to": "2001-01-01"}}, {"BBB": {"_tender": "false"}}]
    assert tool.current_currency("XX", entries) is None
    assert tool.current_currency("XX", [*entries, {"CCC": {"_from": "2001-01-01"}}]) == "CCC"
    assert tool.current_currency("LS", [{"ZAR": {"_from": "1961-02-14"}}]) == "LSL"


def test_language_official_by_law_comes_before_one_official_in_fact(tool: ModuleType) -> None:
    spoken = {
        "fr": {"_populationPercent": "30", "_officialStatus": "official"},
        "wo": {"_populationPercent": "80", "_officialStatus": "de_facto_official"},
    }
    assert tool.main_language(spoken) == "fr"
    assert tool.main_language({"wo": spoken["wo"]}) == "wo"
    assert tool.main_language({"xx": {"_populationPercent": "99"}}) is None


def test_names_become_plain(tool: ModuleType) -> None:
    assert tool.plain("São Tomé & Príncipe") == "sao tome and principe"
    assert tool.plain("Woman’s  Hat") == "woman's hat"


def test_splits_are_spread_over_groups_in_the_requested_counts(tool: ModuleType) -> None:
    codes = [f"{group}{i}" for group in "abcd" for i in range(25)]
    groups = {code: code[0] for code in codes}
    found = tool.spread(codes, groups, {"test": 40, "control": 20}, "salt")
    assert Counter(found.values()) == {"test": 40, "control": 20}
    for group in "abcd":
        assert 8 <= sum(split == "test" for code, split in found.items() if code[0] == group) <= 12
    assert found == tool.spread(reversed(codes), groups, {"test": 40, "control": 20}, "salt")


def test_shipped_files_match_the_tables_of_the_tool(tool: ModuleType) -> None:
    """Counts and vocabulary in the package must follow the constants in the tool, so that both change together."""
    shipped = json.loads((ROOT / "src/mmemb/data/bundled/entities.json").read_text())
    assert shipped["sources"] == tool.PACKAGES
    rows = list(shipped["entities"].values())
    for kind, counts in tool.WITHHELD.items():
        found = Counter(split for row in rows if row["kind"] == kind for split in row["withheld"].values())
        assert found == counts
    assert Counter(row["split"] for row in rows if row.get("split", "train") != "train") == tool.COUNTRIES
    assert sum(row["scene"] for row in rows if row["kind"] == "emoji") == tool.SCENE_VOCABULARY
