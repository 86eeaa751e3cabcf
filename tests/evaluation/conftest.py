import pytest
from PIL import Image

from casp_pl.data import Sample, Turn
from casp_pl.models.tiny import load_tiny


@pytest.fixture
def tiny():
    """(model, processor): hidden size 48, two blocks, 16 image tokens, one token per byte."""
    return load_tiny()


@pytest.fixture
def questions(tmp_path):
    """Seven images with one to four questions of different lengths each."""
    samples = []
    for image in range(7):
        path = tmp_path / f"{image}.png"
        Image.effect_mandelbrot((32, 32), (-2, -1.5, 1 - image / 7, 1.5), 100).convert("RGB").save(path)
        for number in range(1 + image % 4):
            question = f"is it {'very ' * ((3 * image + 5 * number) % 7)}number {number}?"
            answer = ("yes", "no", "red", "a circle")[(image + number) % 4]
            samples.append(Sample(id=f"{image}/{number}", turns=(Turn(question, answer),), images=(path,)))
    return samples
