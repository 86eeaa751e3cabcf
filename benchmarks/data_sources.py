"""Every data source on real files: how fast it is, whether it resumes exactly, what it does with damaged files.

usage: python -m benchmarks.data_sources [--rows 200]

The files are written to a temporary directory by Pillow, datasets and PyAV: photos of 336 x 336 as JPEG, videos of 16
frames. A pass decodes every image. For resume a pass is stopped after a third, its state goes through JSON, and a new
stream of a new source goes on; ids, texts and pixels of both parts together must be those of an undisturbed pass. Then
3 % and 10 % of the files are cut in half, or deleted, in turns, and `python -m casp_pl data` is run on them.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from PIL import Image

from casp_pl.cli import main as command
from casp_pl.data import (
    DataSource,
    HuggingFaceConversations,
    HuggingFaceText,
    LlavaJson,
    Mixture,
    Sample,
    SampleStream,
    TextFiles,
    load_image,
)
from casp_pl.errors import CaspError

SIDE, FRAMES = 336, 16
SHARES = (0.03, 0.1)


class Contender:
    """A source on files of its own.

    Args:
        kind: the class of the source.
        arguments: its constructor's.
        files: what may be damaged.
        text: whether it holds plain texts.
    """

    def __init__(self, kind: type[DataSource], arguments: dict[str, Any], files: Sequence[Path], *, text: bool = False):
        self.kind = kind
        self.arguments = arguments
        self.files = files
        self.text = text

    def source(self) -> DataSource:
        """A new one."""
        return self.kind(**self.arguments)

    def recipe(self) -> dict[str, Any]:
        """The `data` section of a recipe that takes all rows of images, or 32 windows of text."""
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in self.arguments.items()}
        if self.kind is Mixture:
            arguments = {"sources": [_class(source) for source in self.arguments["sources"]], "weights": [3, 1]}
        source = {"class_path": f"casp_pl.data.{self.kind.__name__}", "init_args": arguments}
        key, ratio = ("text_source", 1.0) if self.text else ("source", 0.0)
        count = 32 if self.text else sum(1 for _ in self.source().rows("train"))
        size = {"samples": count, "fine_tuning_samples": count, "questions_per_image": 1}
        return {"data": {key: source, "text_ratio": ratio, "max_length": 8192, **size}}


def _class(source: DataSource) -> dict[str, Any]:
    named = ("path", "image_folder", "frames")
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(source).items()}
    return {
        "class_path": f"casp_pl.data.{type(source).__name__}",
        "init_args": {key: arguments[key] for key in named if key in arguments},
    }


def photo(number: int, side: int = SIDE) -> Image.Image:
    """A smooth picture that compresses like a photo, another one for each number."""
    small = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def talk(marks: str, number: int) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [
        {"from": "human", "value": f"{marks}\nWhat is in picture {number}?"},
        {"from": "gpt", "value": f"Colours, and the number {number}."},
    ]


def llava(folder: Path, rows: int, images: int = 1) -> Contender:
    """LLaVA's JSON with so many images a sample."""
    names = [f"{number}.jpg" for number in range(rows)]
    for number, name in enumerate(names):
        photo(number).save(folder / name)
    content = []
    for number in range(rows):
        own = [names[(number + step) % rows] for step in range(images)]
        content.append({"id": number, "image": own, "conversations": talk("<image>\n" * images, number)})
    (folder / "train.json").write_text(json.dumps(content))
    arguments = {"path": folder / "train.json", "image_folder": folder}
    return Contender(LlavaJson, arguments, [folder / name for name in names])


def videos(folder: Path, rows: int, *, as_files: bool) -> Contender:
    """LLaVA's JSON with videos, as folders of frames or as files."""
    names = [f"{number}.mp4" if as_files else f"{number}" for number in range(rows)]
    for number, name in enumerate(names):
        frames = [photo(number * FRAMES + frame, 224) for frame in range(FRAMES)]
        if as_files:
            write_video(folder / name, frames)
        else:
            (folder / name).mkdir()
            for frame, image in enumerate(frames):
                image.save(folder / name / f"{frame}.jpg")
    content = [{"video": name, "conversations": talk("<video>", number)} for number, name in enumerate(names)]
    (folder / "train.json").write_text(json.dumps(content))
    used = "" if as_files else "2.jpg"  # one of the 4 of 16 frames that are taken
    damaged = [folder / name / used for name in names]
    return Contender(LlavaJson, {"path": folder / "train.json", "image_folder": folder, "frames": 4}, damaged)


def write_video(path: Path, frames: Iterable[Image.Image]) -> None:
    """MPEG-4, 8 frames a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 224, 224, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))  # type: ignore[no-untyped-call]
        container.mux(stream.encode())


def image_folder(folder: Path, rows: int) -> Contender:
    """A folder of images with metadata, read by the package datasets."""
    lines = []
    for number in range(rows):
        photo(number).save(folder / f"{number}.jpg")
        question, answer = (turn["value"].strip() for turn in talk("", number))
        lines.append(json.dumps({"file_name": f"{number}.jpg", "question": question, "answer": answer}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    arguments = {"name": str(folder), "question": "question", "answer": "answer"}
    return Contender(HuggingFaceConversations, arguments, [folder / f"{number}.jpg" for number in range(rows)])


def parquet(folder: Path, rows: int) -> Contender:
    """Parquet files of ten rows each, written by the package datasets, images inside."""
    for first in range(0, rows, 10):
        numbers = range(first, min(first + 10, rows))
        columns = {"talk": [talk("<image>", n) for n in numbers], "image": [photo(n) for n in numbers]}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"train-{first:05d}.parquet")
    arguments = {"name": str(folder), "conversations": "talk"}
    return Contender(HuggingFaceConversations, arguments, sorted(folder.glob("*.parquet")))


def texts(folder: Path, rows: int, ending: str) -> Contender:
    """Texts of 200 words: a file each, or lines of JSON, read by us or by the package datasets."""
    for number in range(rows):
        words = " ".join(f"word{(number * 7 + step) % 1000}" for step in range(200))
        if ending == "txt":
            (folder / f"{number:05d}.txt").write_text(words)
        else:
            with (folder / f"train-{number // 10:03d}.jsonl").open("a") as file:
                file.write(json.dumps({"text": words}) + "\n")
    files = sorted(folder.iterdir())
    if ending == "datasets":
        return Contender(HuggingFaceText, {"name": str(folder), "streaming": True}, files, text=True)
    return Contender(TextFiles, {"path": folder}, files, text=True)


def mixture(folder: Path, rows: int) -> Contender:
    """Images and videos, three to one."""
    parts = []
    for name, make in (("images", llava), ("clips", lambda path, count: videos(path, count, as_files=False))):
        (folder / name).mkdir()
        parts.append(make(folder / name, rows))
    arguments = {"sources": [part.source() for part in parts], "weights": [3.0, 1.0]}
    return Contender(Mixture, arguments, parts[0].files)


CONTENDERS: dict[str, Callable[[Path, int], Contender]] = {
    "LLaVA JSON, one image": llava,
    "LLaVA JSON, three images": lambda folder, rows: llava(folder, rows, 3),
    "videos, folders of frames": lambda folder, rows: videos(folder, rows // 4, as_files=False),
    "videos, files (PyAV)": lambda folder, rows: videos(folder, rows // 4, as_files=True),
    "Hugging Face, parquet, streamed": parquet,
    "Hugging Face, image folder, streamed": image_folder,
    "mixture 3:1 of images and videos": lambda folder, rows: mixture(folder, rows // 2),
    "texts, .txt": lambda folder, rows: texts(folder, rows, "txt"),
    "texts, .jsonl": lambda folder, rows: texts(folder, rows, "jsonl"),
    "texts, Hugging Face, streamed": lambda folder, rows: texts(folder, rows, "datasets"),
}


def content(sample: Sample) -> tuple[str, str]:
    """Id and hash of everything in it."""
    digest = hashlib.sha256(repr((sample.turns, sample.text)).encode())
    for image in sample.images:
        digest.update(load_image(image).tobytes())
    return sample.id, digest.hexdigest()


def resumes(contender: Contender) -> bool:
    """Whether two halves of a pass are a whole one."""
    whole = [content(sample) for sample in SampleStream(contender.source())]
    stopped = SampleStream(contender.source())
    seen = [content(sample) for sample in islice(stopped, len(whole) // 3)]
    resumed = SampleStream(contender.source())
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    return len(whole) > 0 and seen + [content(sample) for sample in resumed] == whole


def damage(files: Sequence[Path], share: float) -> None:
    """Cut files in half or delete them, in turns."""
    for number, file in enumerate(files[: max(1, round(share * len(files)))]):
        if number % 2:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def outcome(contender: Contender, recipe: dict[str, Any], folder: Path) -> str:
    """Exit code of `casp_pl data`, and what a pass over all rows skips or ends with."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    out, errors = StringIO(), StringIO()
    configs = ["configs/llava_aqlm.yaml", "configs/models/tiny.yaml", str(path)]
    with redirect_stdout(out), redirect_stderr(errors):
        code = command(
            ["data", *(word for config in configs for word in ("--config", config)), "--run_dir", str(folder)]
        )
    stream = SampleStream(contender.source())
    try:
        usable = len(list(stream))
        result = f"{usable} usable, {len(stream.skipped)} skipped"
    except CaspError as error:
        first = str(error).splitlines()[-1].replace(str(folder.parent), "...")
        result = f"{len(stream.skipped)} skipped, then: {first[:110]}"
    return f"exit {code}; {result}"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    rows = parser.parse_args().rows
    datasets.disable_progress_bars()
    print("| source | samples/s | resume exact | 3 % damaged | 10 % damaged |\n|---|---:|---|---|---|")
    for number, (name, make) in enumerate(CONTENDERS.items()):
        if "PyAV" in name and find_spec("av") is None:
            print(f"| {name} | PyAV is not installed | | | |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as temporary:
            cells = []
            for part in ("whole", *SHARES):
                folder = Path(temporary) / f"{number}-{part}"
                folder.mkdir()
                contender = make(folder, rows)
                if isinstance(part, float):
                    recipe = contender.recipe()
                    damage(contender.files, part)
                    cells.append(outcome(contender, recipe, folder))
                    continue
                start = time.perf_counter()
                count = len(list(SampleStream(contender.source())))
                seconds = time.perf_counter() - start
                cells += [f"{count / seconds:,.0f}", "yes" if resumes(contender) else "NO"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
