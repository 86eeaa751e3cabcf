import json

import pytest
from PIL import Image

from casp_pl.models.tiny import load_tiny


@pytest.fixture(scope="session")
def tiny():
    """(model, processor): hidden size 48, two blocks, 16 image tokens, one token per byte."""
    return load_tiny()


@pytest.fixture
def llava_folder(tmp_path):
    """Writes images and a LLaVA JSON file; returns a function that takes the rows and gives the file's path."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(30):
        Image.new("RGB", (20, 14), (8 * number, 100, 30)).save(images / f"{number}.png")

    def write(rows, name="train.json"):
        path = tmp_path / name
        path.write_text(json.dumps(rows))
        return path

    return images, write
