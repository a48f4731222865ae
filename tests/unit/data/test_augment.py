import numpy as np
import pytest
from PIL import Image

from mmemb.data.augment import PictureAugment

STILL = {"shift": 0.0, "scale": (1.0, 1.0), "rotate": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}


def picture(side: int = 64) -> Image.Image:
    """Draws a white picture with a red square in the middle."""
    image = Image.new("RGB", (side, side), "white")
    image.paste((200, 40, 40), (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_result_has_the_same_size_and_the_input_is_unchanged() -> None:
    image = picture()
    before = pixels(image)
    changed = PictureAugment()(image, 1)
    assert (changed.size, changed.mode) == ((64, 64), "RGB")
    assert (pixels(image) == before).all()
    assert (pixels(changed) != before).any()


def test_the_result_depends_on_the_seed_alone() -> None:
    image, augment = picture(), PictureAugment()
    assert (pixels(augment(image, 5)) == pixels(augment(image, 5))).all()
    assert (pixels(augment(image, 5)) != pixels(augment(image, 6))).any()


def test_ranges_of_zero_are_the_identity() -> None:
    image = picture()
    assert np.abs(pixels(PictureAugment(**STILL)(image, 3)) - pixels(image)).max() <= 1


def centre(image: Image.Image) -> np.ndarray:
    """Returns the mean (x, y) of the dark pixels."""
    y, x = np.nonzero(pixels(image)[..., 1] < 128)
    return np.array([x.mean(), y.mean()])


def test_shift_moves_by_at_most_its_pixels_and_fills_with_white() -> None:
    augment = PictureAugment(**{**STILL, "shift": 6.0})
    moves = np.array([centre(augment(picture(), seed)) - centre(picture()) for seed in range(40)])
    assert np.abs(moves).max() <= 6.5
    assert moves.min() < -4
    assert moves.max() > 4
    black = Image.new("RGB", (64, 64), "black")
    assert {pixels(augment(black, seed)).max() for seed in range(8)} == {255}


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_scale_zooms_about_the_centre(factor: float) -> None:
    zoomed = PictureAugment(**{**STILL, "scale": (factor, factor)})(picture(), 0)
    area = (pixels(zoomed)[..., 1] < 128).sum() / (pixels(picture())[..., 1] < 128).sum()
    assert area == pytest.approx(factor**2, rel=0.1)
    assert centre(zoomed) == pytest.approx(centre(picture()), abs=0.6)


def test_rotation_keeps_the_area_and_turns_the_corners() -> None:
    turned = PictureAugment(**{**STILL, "rotate": 45.0})(picture(), 4)
    area = (pixels(turned)[..., 1] < 128).sum() / (pixels(picture())[..., 1] < 128).sum()
    assert area == pytest.approx(1, rel=0.03)
    assert centre(turned) == pytest.approx(centre(picture()), abs=0.6)
    assert (pixels(turned) != pixels(picture())).any()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_colour_change_changes_what_its_name_says(name: str) -> None:
    flat = Image.new("RGB", (4, 4), (150, 90, 60))
    seen = np.array([pixels(PictureAugment(**{**STILL, name: 0.5})(flat, seed))[0, 0] for seed in range(30)])
    grey = seen @ [0.299, 0.587, 0.114]
    if name == "saturation":
        assert np.ptp(grey) <= 1.5
        assert np.ptp(seen.max(1) - seen.min(1)) > 30
    elif name == "brightness":
        assert seen[:, 0] / seen[:, 2] == pytest.approx(150 / 60, rel=0.05)
        assert np.ptp(grey) > 30
    else:
        assert ((seen[:, 0] >= 128) & (seen[:, 2] <= 128)).all()
        assert np.ptp(seen[:, 0] - seen[:, 2]) > 30


def test_a_grey_picture_becomes_rgb() -> None:
    assert PictureAugment()(Image.new("L", (8, 6), 200), 0).mode == "RGB"


@pytest.mark.parametrize("scale", [(0.0, 1.0), (1.2, 0.8)])
def test_an_impossible_scale_is_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"augment\.scale\.\w+est is 0\.[08]; give"):
        PictureAugment(scale=scale)
