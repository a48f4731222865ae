import struct
import zlib
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, IcoImagePlugin, Image

from mmemb.data.images import load_image, resolve_image
from mmemb.data.items import PICTURE_SUFFIXES


def save(path: Path, image: Image.Image, **options: object) -> str:
    image.save(path, **options)
    return str(path)


def test_a_file_becomes_rgb(tmp_path: Path) -> None:
    image = load_image(save(tmp_path / "a.png", Image.new("L", (3, 5), 7)))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 5), (7, 7, 7))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_flattened_on_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert(mode)
    assert load_image(save(tmp_path / "a.png", clear)).getpixel((1, 1)) == (255, 255, 255)


def test_a_palette_with_a_transparent_entry_is_flattened_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    loaded = load_image(save(tmp_path / "a.png", image, transparency=0))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 1)) == (200, 100, 50)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("I;16", (2, 2), 257 * 100))
    assert load_image(path).getpixel((0, 0)) == (100, 100, 100)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # must be rotated by 90 degrees
    path = save(tmp_path / "a.jpg", Image.new("RGB", (8, 4)), exif=exif)
    assert load_image(path).size == (4, 8)


def test_a_pil_image_is_copied_and_stays_unchanged() -> None:
    source = Image.new("RGB", (2, 2))
    load_image(source).putpixel((0, 0), (255, 0, 0))
    assert source.getpixel((0, 0)) == (0, 0, 0)


def test_the_bundled_data_opens_a_bundled_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "mmemb.data.bundled.open_picture", lambda name: asked.append(name) or Image.new("RGB", (6, 6)), raising=False
    )
    assert load_image("bundled:anything").size == (6, 6)
    assert asked == ["bundled:anything"]


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_image(str(tmp_path / "gone.png"))
    assert "gone.png" in one_line(caught)
    assert "correct the path" in str(caught.value)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png: cannot be read") as caught:
        load_image(str(tmp_path / "notes.png"))
    one_line(caught)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_picture_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"half\.{suffix}: cannot be read"):
        load_image(str(path))


def png_header(width: int, height: int) -> bytes:
    """Writes a PNG that declares a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("side", [7_100, 40_000])
def test_a_picture_bomb_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(ValueError, match=r"bomb\.png: .*50,000,000.*shrink") as caught:
        load_image(str(tmp_path / "bomb.png"))
    one_line(caught)


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_every_picture_suffix_of_a_folder_is_decoded(tmp_path: Path, suffix: str) -> None:
    assert load_image(save(tmp_path / f"a{suffix}", Image.new("RGB", (3, 5)))).size == (3, 5)


def test_files_of_other_formats_reach_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(IcoImagePlugin, "IcoFile", reached)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", reached)
    Image.new("RGB", (32, 32)).save(tmp_path / "icon.png", format="ICO")
    (tmp_path / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    for name in ("icon", "script"):
        with pytest.raises(ValueError, match=rf"{name}\.png: cannot be read as PNG, .* or TIFF; convert it") as caught:
            load_image(str(tmp_path / f"{name}.png"))
        one_line(caught)


def test_the_pixel_limit_is_inclusive(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (10, 10)))
    assert load_image(path, max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="10 x 10 pixels, but the maximum is 99"):
        load_image(path, max_pixels=99)


def test_a_path_is_joined_to_its_root(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = save(tmp_path / "sub" / "a.png", Image.new("RGB", (1, 1)))
    assert resolve_image("sub/a.png", tmp_path) == path
    assert resolve_image("sub/../sub/a.png", tmp_path) == path
    assert resolve_image(path, tmp_path) == path


def test_a_root_that_is_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path = save(tmp_path / "real" / "a.png", Image.new("RGB", (1, 1)))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert resolve_image("a.png", tmp_path / "link") == path


@pytest.mark.parametrize(
    "path", ["../secret.png", "sub/../../secret.png", "{outside}/secret.png", "file_link.png", "folder_link/secret.png"]
)
def test_a_path_out_of_the_root_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    save(tmp_path / "secret.png", Image.new("RGB", (1, 1)))
    (root / "file_link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder_link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="outside its root .* image_root") as caught:
        resolve_image(path.format(outside=tmp_path), root)
    one_line(caught)


def test_a_sibling_folder_whose_name_starts_like_the_root_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    save(tmp_path / "root2" / "a.png", Image.new("RGB", (1, 1)))
    with pytest.raises(ValueError, match="outside its root"):
        resolve_image("../root2/a.png", tmp_path / "root")


def test_a_missing_image_and_a_folder_have_different_errors(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match=r"image 'gone\.png' does not exist in .*image_root"):
        resolve_image("gone.png", tmp_path)
    with pytest.raises(ValueError, match="image 'sub' is a folder"):
        resolve_image("sub", tmp_path)


def test_bundled_names_pass_unchanged(tmp_path: Path) -> None:
    assert resolve_image("bundled:noto/1f34e", tmp_path) == "bundled:noto/1f34e"


def test_a_relative_root_follows_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "a.png", Image.new("RGB", (2, 2)))
        monkeypatch.chdir(tmp_path / name)
        assert resolve_image("a.png", ".") == str((tmp_path / name / "a.png").resolve())
