import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from casp_pl.data.images import MAX_PIXELS, ImageRefusedError, load_image

RNG = np.random.default_rng(0)


def save(image, path, **options):
    image.save(path, **options)
    return path


def pixels(image):
    return np.asarray(image).astype(int)


def png_header_only(width, height):
    """A PNG that claims a size and holds almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_rgb_is_unchanged(tmp_path):
    array = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    loaded = load_image(save(Image.fromarray(array), tmp_path / "a.png"))
    assert loaded.mode == "RGB"
    assert (pixels(loaded) == array).all()


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (11_000, 11_000), (7_100, 7_100)])
def test_bombs_are_refused_from_the_header(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_only(width, height))
    assert width * height > MAX_PIXELS
    with pytest.raises(ImageRefusedError, match="pixels"):
        load_image(path)


def test_long_lines_are_refused(tmp_path):
    with pytest.raises(ImageRefusedError, match="300x1"):
        load_image(save(Image.new("RGB", (300, 1)), tmp_path / "line.png"))


def test_missing_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "picture.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    for name, reason in (("absent.png", "no such file"), ("empty.png", "empty file"), ("text.png", "cannot be decoded"),
                         ("picture.eps", "cannot be decoded")):  # fmt: skip
        with pytest.raises(ImageRefusedError) as caught:
            load_image(tmp_path / name)
        assert reason in caught.value.reason
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_damaged_files_are_read_or_refused_never_a_crash(tmp_path, kind):
    image = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    data = save(image, tmp_path / f"whole.{kind}").read_bytes()
    path = tmp_path / f"damaged.{kind}"
    refused = 0
    for trial in range(60):
        broken = bytearray(data[: RNG.integers(1, len(data))] if trial % 2 else data)
        for position in RNG.integers(0, len(broken), 3):
            broken[position] = RNG.integers(0, 256)
        path.write_bytes(broken)
        try:
            assert load_image(path).mode == "RGB"
        except ImageRefusedError:
            refused += 1
    assert refused >= 20


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated_images_are_refused(tmp_path, kind):
    path = save(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), tmp_path / f"a.{kind}")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ImageRefusedError, match="cannot be decoded"):
        load_image(path)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 256, 40_000, 65_535]], dtype=np.uint16)
    loaded = load_image(save(Image.fromarray(deep), tmp_path / "deep.png"))
    assert pixels(loaded)[0].tolist() == [[0] * 3, [1] * 3, [156] * 3, [255] * 3]


def test_cmyk(tmp_path):
    path = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "red.jpg", quality=95)
    red, green, blue = pixels(load_image(path))[4, 4]
    assert red > 240
    assert max(green, blue) < 15


def test_palette_grey_and_bilevel(tmp_path):
    red = Image.new("RGB", (4, 4), (200, 10, 20))
    assert pixels(load_image(save(red.quantize(4), tmp_path / "p.png")))[0, 0].tolist() == [200, 10, 20]
    assert pixels(load_image(save(Image.new("L", (4, 4), 77), tmp_path / "l.png")))[0, 0].tolist() == [77] * 3
    assert pixels(load_image(save(Image.new("1", (4, 4), 1), tmp_path / "b.png")))[0, 0].tolist() == [255] * 3


def test_transparency_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert pixels(load_image(save(clear, tmp_path / "a.png")))[0].tolist() == [[255] * 3, [10, 20, 30]]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    loaded = load_image(save(image, tmp_path / "a.jpg", exif=exif, quality=95))
    assert loaded.size == (8, 16)
    assert pixels(loaded)[3, 4].min() > 240
    assert pixels(loaded)[12, 4].max() < 15


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animations_are_refused(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    path = save(frames[0], tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageRefusedError, match="animation of 3 frames"):
        load_image(path)


def test_floating_point_images_are_refused(tmp_path):
    path = save(Image.fromarray(np.ones((4, 4), dtype=np.float32)), tmp_path / "f.tiff")
    with pytest.raises(ImageRefusedError, match="mode F"):
        load_image(path)


def test_one_pixel_goes_through_the_processor(tmp_path, tiny):
    _, processor = tiny
    image = load_image(save(Image.new("RGB", (1, 1), (255, 0, 0)), tmp_path / "one.png"))
    values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    wide = processor.image_processor(images=[image.resize((32, 32))], return_tensors="pt")["pixel_values"][0]
    assert values.shape == (3, 32, 32)
    assert (values == wide).all()
