"""Builds the bundled data set: `pictures.zip` and `entities.json` of `mmemb.data.bundled`.

    python -m tools.build_bundled [--packages DIR] [--output src/mmemb/data/bundled]

Needs `pip install 'mmemb[tools]'` (babel for English names, resvg to draw SVG) and, unless ``--packages`` holds the
archives, `npm` on the path. The output is a pure function of the archives, of resvg and of the libwebp that Pillow
carries: entries are sorted, time stamps fixed, and every choice that looks random is a hash. Sources and licences are
in NOTICE.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmemb.common.digests import number_of
from mmemb.common.files import whole_file
from tools.bundled_lists import (
    COUNTRY_NAMES,
    CURRENCY_NAMES,
    DROPPED,
    DROPPED_TERRITORIES,
    MAIN_CURRENCY,
    RENAMED,
    SUBCATEGORIES,
)

PACKAGES = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "emojibase-data": "17.0.0",
    "cldr-core": "48.2.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/streamline-emojis": "1.2.4",
}
VENDORS = {"noto": ("emoji-datasource-google", "google"), "twemoji": ("emoji-datasource-twitter", "twitter")}
STYLES = {
    "fluent": "@iconify-json/fluent-emoji-flat",
    "emojione": "@iconify-json/emojione",
    "fxemoji": "@iconify-json/fxemoji",
    "fluent-color": "@iconify-json/fluent-emoji",
    "streamline": "@iconify-json/streamline-emojis",
}
"""More styles, for training pictures only. With two styles, the thing of a withheld picture was seen in one drawing."""
MISNAMED = {("streamline", "turkey")}
"""Pictures of a style that show another thing with the same name (here the flag)."""
SIDE, LIMIT_BYTES = 64, 5_000_000
QUALITY, STYLE_QUALITY = 85, 75
"""Quality of the WebP files: of the vendors' pictures, and of the other styles."""

WITHHELD = {
    "emoji": {"test": 110, "control": 60, "validation": 60},
    "flag": {"test": 40, "control": 15, "validation": 15},
}
"""Number of entities of which a split withholds one vendor's picture, by kind."""
COUNTRIES = {"test": 45, "control": 25, "validation": 20}
"""Number of countries whose flag -> attribute composition is in a held-out split; the others are in train."""
SCENE_VOCABULARY = 80


def order(*parts: object) -> int:
    """A stable pseudo-random number made from the arguments, 64 bits."""
    return number_of("/".join(map(str, parts)))


def plain(name: str) -> str:
    """The name in lower case and ASCII, with straight quotes, for a vocabulary of a few hundred words."""
    text = unicodedata.normalize("NFKD", name.replace("’", "'").replace("&", "and"))
    return " ".join("".join(c for c in text if ord(c) < 128).lower().split())


def current_currency(
    code: str, entries: Sequence[Mapping[str, Mapping[str, str]]], today: str = "2026-01-01"
) -> str | None:
    """ISO 4217 code of the main legal tender (the first of CLDR's entries that has not ended), or None."""
    if code in MAIN_CURRENCY:
        return MAIN_CURRENCY[code]
    for entry in entries:
        (currency, facts), *_ = entry.items()
        if (
            facts.get("_tender") != "false"
            and ("_to" not in facts or facts["_to"] > "2026-02")
            and facts["_from"] <= today
        ):
            return currency
    return None


def main_language(languages: Mapping[str, Mapping[str, str]]) -> str | None:
    """Code of the most spoken official language, or None. If none is official by law, those official in fact count."""
    for status in ("official", "de_facto_official"):
        found = [
            (-float(facts["_populationPercent"]), code.split("_")[0])
            for code, facts in languages.items()
            if facts.get("_officialStatus") == status
        ]
        if found:
            return min(found)[1]
    return None


def spread(codes: Iterable[str], groups: Mapping[str, str], counts: Mapping[str, int], salt: str) -> dict[str, str]:
    """Assigns ``counts[split]`` of the codes to each split, evenly over their groups; the rest is left out."""
    ranked = sorted(codes, key=lambda code: (groups[code], order(salt, code)))
    # A low-discrepancy sequence gives every rank a place in (0, 1), so that neighbours in rank are far apart.
    places = sorted(range(len(ranked)), key=lambda i: (i * 0.6180339887498949) % 1.0)
    splits = [split for split, count in counts.items() for _ in range(count)]
    return {ranked[place]: split for place, split in zip(places, splits, strict=False)}


class Package:
    """An npm archive that is read without unpacking."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path)  # noqa: SIM115 - lives as long as the object
        self._names = set(self._tar.getnames())

    def __contains__(self, name: str) -> bool:
        return f"package/{name}" in self._names

    def read(self, name: str) -> bytes:
        member = self._tar.extractfile(f"package/{name}")
        if member is None:
            raise ValueError(f"{name} is not a file in the archive")
        return member.read()

    def json(self, name: str) -> Any:
        return json.loads(self.read(name))


def fetch(folder: Path) -> dict[str, Package]:
    """Opens the archives in the folder, after `npm pack` has fetched the missing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = {}
    for name, version in PACKAGES.items():
        path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        packages[name] = Package(path)
    return packages


def picture(data: bytes, *, quality: int = QUALITY) -> bytes:
    """Converts a PNG to WebP of 64 x 64 pixels on a white background."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    out = io.BytesIO()
    flat.save(out, "WEBP", quality=quality, method=6)
    return out.getvalue()


def style_pictures(style: str, package: Package, names: Mapping[str, str]) -> dict[str, bytes]:
    """Draws the SVG pictures of one more style for the entities that it has; returns them by picture name.

    Args:
        style: name of the style.
        package: archive of the style, which lists its pictures by code point, or else by name.
        names: names of the entities, by key.
    """
    import resvg_py

    by_key, icons = package.json("chars.json"), package.json("icons.json")
    known = {
        **icons["icons"],
        **{name: icons["icons"][row["parent"]] for name, row in icons.get("aliases", {}).items()},
    }
    by_name = {squeezed(name): name for name in known}
    drawn = {}
    for key, name in names.items():
        icon = known.get(by_key.get(key) or (None if by_key else by_name.get(squeezed(name))))
        if icon is None or (style, name) in MISNAMED:
            continue
        left, top = icons.get("left", 0), icons.get("top", 0)
        box = f"{left} {top} {icon.get('width', icons.get('width', 16))} {icon.get('height', icons.get('height', 16))}"
        size = f'viewBox="{box}" width="{SIDE}" height="{SIDE}"'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{icon["body"]}</svg>'
        drawn[f"{style}/{key}.webp"] = picture(bytes(resvg_py.svg_to_bytes(svg_string=svg)), quality=STYLE_QUALITY)
    return drawn


def squeezed(name: str) -> str:
    """Only the letters and digits of a name."""
    return "".join(character for character in plain(name) if character.isalnum())


def emoji_entities(table: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The entities other than flags: code point key -> name, category, kind, picture file."""
    category_of = {sub: category for category, subs in SUBCATEGORIES.items() for sub in subs}
    drop, entities, taken = set(DROPPED.replace("\n", "").split("|")), {}, set[str]()
    for row in sorted(table, key=lambda row: row["sort_order"]):
        key = row["image"].removesuffix(".png").replace("-fe0f", "")
        label = plain(labels.get(key, ""))
        name = RENAMED.get(label, label)
        twin = (
            label in drop
            or label.startswith("oncoming ")
            or (" face" in label and label != "clown face")
            or name in taken
        )
        if not name or row["subcategory"] not in category_of or twin or len(name.split()) > 3:
            continue
        taken.add(name)
        entities[key] = {
            "name": name,
            "category": category_of[row["subcategory"]],
            "kind": "emoji",
            "file": row["image"],
        }
    return entities


def country_entities(table: Sequence[Mapping[str, Any]], cldr: Package, english: Any) -> dict[str, dict[str, Any]]:
    """The flags: code point key -> name, category, kind, picture file, country code, attributes."""
    currencies = cldr.json("supplemental/currencyData.json")["supplemental"]["currencyData"]["region"]
    territories = cldr.json("supplemental/territoryInfo.json")["supplemental"]["territoryInfo"]
    containment = cldr.json("supplemental/territoryContainment.json")["supplemental"]["territoryContainment"]
    region_of = {
        code: group
        for group, facts in containment.items()
        if group.isdigit() and not facts.get("_grouping") and not facts.get("_status")
        for code in facts["_contains"]
        if code.isalpha()
    }
    entities = {}
    for row in table:
        if row["subcategory"] != "country-flag":
            continue
        code = "".join(chr(int(unit, 16) - 0x1F1E6 + ord("A")) for unit in row["unified"].split("-"))
        if (
            code in DROPPED_TERRITORIES.split()
            or code not in region_of
            or code not in currencies
            or code not in territories
        ):
            continue
        currency = current_currency(code, currencies[code])
        language = main_language(territories[code].get("languagePopulation", {}))
        if currency is None or language is None:
            continue
        entities[row["image"].removesuffix(".png")] = {
            "name": COUNTRY_NAMES.get(code, plain(english.territories[code])),
            "category": "flag",
            "kind": "flag",
            "file": row["image"],
            "country": code,
            "attributes": {
                "currency": CURRENCY_NAMES.get(currency, plain(english.currencies[currency])),
                "language": plain(english.languages[language]),
                "region": plain(english.territories[region_of[code]]),
            },
        }
    return entities


def assign_splits(entities: dict[str, dict[str, Any]]) -> None:
    """Adds ``withheld`` (vendor -> split), ``split`` of countries and ``scene``, in place.

    At most one vendor of an entity is withheld, so its other picture is always a training picture. This is the second
    draw. An entity that is withheld in both draws loses the other vendor this time. So no picture is held out whose
    score was known before.
    """
    groups = {key: entity["category"] for key, entity in entities.items()}
    for kind, counts in WITHHELD.items():
        keys = [key for key, entity in entities.items() if entity["kind"] == kind]
        if sum(counts.values()) > len(keys) * 0.6:
            counts = {split: int(len(keys) * 0.6 * count / sum(counts.values())) for split, count in counts.items()}
        taken = spread(keys, groups, counts, "withheld, second draw")
        for key in keys:
            vendor = sorted(VENDORS)[(order("vendor", key) + 1) % 2]
            entities[key]["withheld"] = {vendor: taken[key]} if key in taken else {}
    flags = {key: entity["attributes"]["region"] for key, entity in entities.items() if entity["kind"] == "flag"}
    held_out = spread(flags, flags, COUNTRIES, "country, second draw")
    free = [key for key, entity in entities.items() if entity["kind"] == "emoji" and not entity["withheld"]]
    scene = spread(free, groups, {"scene": min(SCENE_VOCABULARY, len(free))}, "scene")
    for key, entity in entities.items():
        if entity["kind"] == "flag":
            entity["split"] = held_out.get(key, "train")
        entity["scene"] = key in scene or (entity["kind"] == "flag" and not entity["withheld"])


def without_twins(entities: dict[str, dict[str, Any]], pictures: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Drops an entity if a vendor draws it exactly like an earlier one, since the picture would not decide the name."""
    seen: set[tuple[str, bytes]] = set()
    kept = {}
    for key, entity in entities.items():
        drawn = {(vendor, pictures[f"{vendor}/{key}.webp"]) for vendor in VENDORS}
        if not drawn & seen:
            kept[key] = entity
            seen |= drawn
    return kept


def build(packages: Mapping[str, Package], english: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of `entities.json`, and the WebP files by name."""
    table = packages["emoji-datasource-google"].json("emoji.json")
    labels = {
        row["hexcode"].lower().replace("-fe0f", ""): row["label"]
        for row in packages["emojibase-data"].json("en/data.json")
    }
    countries = country_entities(table, packages["cldr-core"], english)
    entities = emoji_entities(table, labels) | dict(sorted(countries.items(), key=lambda kv: kv[1]["name"]))
    pictures: dict[str, bytes] = {}
    for key in list(entities):
        file = entities[key].pop("file")
        paths = {vendor: (package, f"img/{folder}/64/{file}") for vendor, (package, folder) in VENDORS.items()}
        if any(path not in packages[package] for package, path in paths.values()):
            del entities[key]
            continue
        pictures |= {f"{vendor}/{key}.webp": picture(packages[pkg].read(path)) for vendor, (pkg, path) in paths.items()}
    entities = without_twins(entities, pictures)
    assign_splits(entities)
    kept = {f"{vendor}/{key}.webp" for vendor in VENDORS for key in entities}
    names = {key: row["name"] for key, row in entities.items() if row["kind"] == "emoji"}
    for style, package in STYLES.items():
        drawn = style_pictures(style, packages[package], names)
        pictures |= drawn
        kept |= drawn.keys()
        for key in names:
            if f"{style}/{key}.webp" in drawn:
                entities[key].setdefault("styles", []).append(style)
    sources = {name: version for name, version in sorted(PACKAGES.items())}
    return {"sources": sources, "entities": entities}, {name: pictures[name] for name in sorted(kept)}


def write(output: Path, content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> int:
    """Writes both files, each completely or not at all; returns their size in bytes."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name in sorted(pictures):
            file.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), pictures[name])
    rows = ",\n".join(
        f" {json.dumps(key)}: {json.dumps(entity, sort_keys=True)}" for key, entity in content["entities"].items()
    )
    table = f'{{"sources": {json.dumps(content["sources"])},\n"entities": {{\n{rows}\n}}}}\n'
    files = {"entities.json": table.encode(), "pictures.zip": archive.getvalue()}
    size = sum(map(len, files.values()))
    if size > LIMIT_BYTES:
        raise ValueError(f"the data set would take {size} bytes, but at most {LIMIT_BYTES} are allowed; drop entities")
    for name, data in files.items():
        with whole_file(output / name) as temporary:
            temporary.write_bytes(data)
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the data set from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Builds pictures.zip and entities.json of the bundled data set.")
    parser.add_argument(
        "--packages",
        type=Path,
        help="folder of the npm archives; missing ones are fetched into it (default: a temporary folder)",
    )
    default = Path(__file__).resolve().parents[1] / "src" / "mmemb" / "data" / "bundled"
    parser.add_argument("--output", type=Path, default=default, help="folder to write to (default: the package)")
    options = parser.parse_args(arguments)
    try:
        import resvg_py  # noqa: F401 - fails now instead of after minutes
        from babel import Locale
    except ImportError as error:
        print(f"{error.name} is not installed; run pip install 'mmemb[tools]'", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        content, pictures = build(fetch(options.packages or Path(temporary)), Locale("en"))
    size = write(options.output, content, pictures)
    kinds = [entity["kind"] for entity in content["entities"].values()]
    print(
        f"{kinds.count('emoji')} emoji, {kinds.count('flag')} flags, {len(pictures)} pictures, {size} bytes "
        f"-> {options.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
