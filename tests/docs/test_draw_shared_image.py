"""The script that draws the README's figure uses the code that packs rows, and still runs."""

from PIL import Image, ImageColor

from docs.draw_shared_image import BRANCHES, SHARED, draw


def test_the_picture_shows_a_branch_for_each_caption(tmp_path):
    draw(tmp_path / "shared_image.png")
    with Image.open(tmp_path / "shared_image.png") as picture:
        colours = set(picture.convert("RGB").get_flattened_data())
    assert {ImageColor.getrgb(colour) for colour in (SHARED, *BRANCHES)} <= colours
