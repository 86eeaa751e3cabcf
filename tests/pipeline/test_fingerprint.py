"""What a run directory belongs to: every weight, picture and word, whatever file it is in and however it is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from casp_pl.cli import recipe_parsers, settings_from
from casp_pl.models.tiny import load_tiny
from casp_pl.pipeline.prepare import fingerprint, prepare

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 15 pictures to learn from, 10 to be judged on, all of them used, and two texts."""
    folder = tmp_path_factory.mktemp("desk")
    model, processor = load_tiny()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    for name, numbers in (("train", range(15)), ("test", range(15, 25))):
        for number in numbers:
            Image.new("RGB", (20, 14), (5 * number, 9, 9)).save(folder / f"images/{number}.png")
        rows = [{"id": number, "image": f"{number}.png", "conversations": turns} for number in numbers]
        (folder / f"{name}.json").write_text(json.dumps(rows))
        (folder / f"{name}.txt").write_text(f"The {name} was late, and nobody knew why it was so. " * 99)
    return folder


def known(recipe: list[str], folder: Path, *, streaming: bool = False) -> dict[str, object]:
    """The fingerprint of a run on what lies there, but for the recipe, which names the folder."""
    pictures = next(path for path in (folder / "moved", folder / "images") if path.exists())
    options = ["--model.source", str(folder / "model"), "--model.streaming", str(streaming).lower()]
    for part in ("data", "evaluation"):
        options += [f"--{part}.source", "LlavaJson", f"--{part}.source.image_folder", str(pictures)]
        options += [f"--{part}.source.path", str(folder / "train.json")]
        options += [f"--{part}.text_source", "TextFiles", f"--{part}.text_source.path", str(folder / "train.txt")]
    options += ["--evaluation.source.test_path", str(folder / "test.json"), "--data.fine_tuning_samples", "null"]
    options += ["--evaluation.text_source.test_path", str(folder / "test.txt"), "--evaluation.questions", "10"]
    parser = recipe_parsers()["fit"]
    settings = settings_from(parser, parser.parse_args([*recipe, *options]))
    found = fingerprint(settings, prepare(settings, digest=True))
    del found["recipe"]
    return found


@pytest.fixture(scope="module")
def before(recipe: list[str], desk: Path) -> dict[str, object]:
    return known(recipe, desk)


def weights(change: Callable[[torch.Tensor], object]) -> Change:
    def work(folder: Path) -> None:
        path = folder / "model/model.safetensors"
        tensors = load_file(path)
        change(next(tensor for name, tensor in tensors.items() if name.endswith("layers.1.mlp.up_proj.weight")))
        save_file(tensors, path, metadata={"format": "pt"})

    return work


def picture(number: int) -> Change:
    return lambda folder: Image.new("RGB", (20, 14), (1, 2, 3)).save(folder / f"images/{number}.png")


def words(file: str, old: str, new: str) -> Change:
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda folder: (folder / "images").rename(folder / "moved"), set(), id="pictures moved"),
        pytest.param(weights(lambda tensor: tensor[3, 5].mul_(-1)), {"model"}, id="one sign"),
        pytest.param(weights(lambda tensor: tensor.copy_(tensor.flip(0))), {"model"}, id="rows in another order"),
        pytest.param(words("model/config.json", "10000.0", "20000.0"), {"model_config"}, id="base of rotary positions"),
        pytest.param(words("model/processor_config.json", "0.4578275", "0.5"), {"image_processor"}, id="mean of green"),
        pytest.param(picture(7), {"data"}, id="picture to learn from"),
        pytest.param(words("train.txt", "late", "soon"), {"data"}, id="text to learn from"),
        pytest.param(picture(17), {"evaluation"}, id="picture to be judged on"),
        pytest.param(words("test.json", "What is", "Who is"), {"evaluation"}, id="question"),
        pytest.param(words("test.json", "A cat.", "A dog."), {"evaluation"}, id="answer that is right"),
        pytest.param(words("test.txt", "late", "soon"), {"evaluation"}, id="text to be judged on"),
    ],
)
def test_every_change_is_seen_where_it_belongs(
    change: Change, expected: set[str], recipe: list[str], desk: Path, before: dict[str, object], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(desk, tmp_path / "desk"))
    change(folder)
    after = known(recipe, folder)
    assert {name for name in before if before[name] != after[name]} == expected


def test_a_model_whose_blocks_stay_on_disk_is_the_same_model(
    recipe: list[str], desk: Path, before: dict[str, object]
) -> None:
    assert known(recipe, desk, streaming=True) == before
