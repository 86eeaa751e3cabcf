"""Sources that stream: only as far read as needed, never more images held than chosen, the same choice by the seed."""

import weakref
from collections import Counter
from io import BytesIO
from itertools import count

import pytest
from PIL import Image

from casp_pl.data import CalibrationData, EvaluationData, Mixture, Sample, StoredImage, Turn
from casp_pl.data.selection import some_images
from casp_pl.data.sources import DataSource


class Held:
    """The bytes of an image; knows which of its kind are still held by anyone."""

    alive = weakref.WeakSet()

    def __init__(self, number):
        file = BytesIO()
        Image.new("RGB", (6, 5), (number % 256, number // 256 % 256, 40)).save(file, "PNG")
        self.data = file.getvalue()
        Held.alive.add(self)

    def __call__(self):
        return self.data


class Endless(DataSource):
    """Two questions about each of endless images; remembers how far it was read and how many images were held."""

    streams = True

    def __init__(self):
        self.read, self.most = 0, 0

    def rows(self, split, start=0):
        for row in count(start):
            image = StoredImage(f"image{row // 2}", Held(row // 2))
            yield Sample(id=f"{split}{row}", turns=(Turn(f"Which, {row}?", f"{row % 5}"),), images=(image,))
            self.read = max(self.read, row + 1)
            self.most = max(self.most, len(Held.alive))


def calibration(tiny, source, **settings):
    data = CalibrationData(source=source, **({"samples": 12, "text_ratio": 0, "batch_size": 4} | settings))
    data.attach(tiny[1])
    data.setup()
    return data


def ids(data):
    return [sample.id for samples in data.parts.values() for sample in samples]


def test_an_endless_source_is_read_as_far_as_needed_and_only_what_is_chosen_is_held(tiny):
    source = Endless()
    data = calibration(tiny, source, fine_tuning_samples=20, questions_per_image=2)
    assert (source.read, data.counts["rows"]) == (1039, 1040), "20 samples of 2 rows, and 1,000 more to choose from"
    assert len(ids(data)) == 20
    assert source.most <= 22
    del data
    assert len(Held.alive) <= 1


def test_rows_says_how_far_a_stream_is_read(tiny):
    source = Endless()
    data = calibration(tiny, source, rows=50)
    assert (source.read, data.counts["rows"], len(ids(data))) == (49, 50, 12)
    mixed = Mixture(sources=[Endless(), Endless()])
    assert calibration(tiny, mixed, rows=50).counts["rows"] == 50


def test_the_seed_decides_what_is_chosen_of_a_stream(tiny):
    chosen = [calibration(tiny, Endless(), seed=seed) for seed in (1, 1, 2)]
    assert ids(chosen[0]) == ids(chosen[1])
    assert chosen[0].fingerprint == chosen[1].fingerprint
    assert not {*ids(chosen[0])} & {*ids(chosen[2])}
    batches = zip(chosen[0].train_dataloader(), chosen[1].train_dataloader(), strict=True)
    assert all((one["pixel_values"] == other["pixel_values"]).all() for one, other in batches)


def test_evaluation_on_an_endless_source(tiny):
    source = Endless()
    data = EvaluationData(source=source, questions=9, text_tokens=0)
    data.attach(tiny[1])
    assert data.counts["questions"] == 9
    assert data.counts["images"] == 5, "whole images, then a cut"
    assert source.read == 1008
    assert source.most <= 11


@pytest.mark.parametrize("wanted", [1, 7, 40, 60])
def test_every_image_is_drawn_with_the_same_chance_and_with_all_its_samples(wanted):
    drawn = Counter()
    for seed in range(300):
        samples = [
            Sample(id=f"{n}", turns=(Turn("?", "!"),), images=(StoredImage(f"{n % 40}", bytes),)) for n in range(80)
        ]
        chosen = Counter(sample.image for sample in some_images(samples, wanted, seed))
        assert len(chosen) == min(wanted, 40)
        assert {*chosen.values()} == {2}
        drawn.update({*chosen})
    expected = 300 * min(wanted, 40) / 40
    squares = sum((drawn[image] - expected) ** 2 / expected for image in drawn)
    assert len(drawn) == 40
    assert squares < 75, "chi-square of 39 degrees of freedom: 0.04 % are beyond"
