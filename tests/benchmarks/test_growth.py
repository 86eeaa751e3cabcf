"""What the growth benchmark makes of its figures."""

import pytest
from PIL import Image

from benchmarks.growth import doubling, draw, exponent


def test_the_exponent_is_that_of_the_four_largest_sizes():
    assert exponent({size: 3 * size**2.5 for size in doubling(256, 4096)}) == pytest.approx(2.5)
    assert exponent({1: 100.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}) == pytest.approx(1)


def test_sizes_double_up_to_the_largest():
    assert doubling(256, 2048) == [256, 512, 1024, 2048]
    assert doubling(256, 3000) == [256, 512, 1024, 2048]


def test_curves_are_drawn(tmp_path):
    quantizers = {"one": {256: 0.1, 512: 0.4, 1024: 2.0}, "other": {256: 0.2, 512: 0.9, 1024: 4.0}}
    draw(quantizers, {2048: 1.0, 4096: 2.0, 8192: 4.1}, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.size == (1200, 480)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # of the first and the second curve of an axis
