"""lm-eval and lmms-eval, by their own command lines, on a model that `fit` saved; data that comes with the packages.

usage: .venv-eval/bin/python -m benchmarks.harnesses RUN [--questions 64] [--texts 8]     (after `make harnesses`)

lm-eval scores held-out text, the one of every report (its perplexities are of words and bytes), lmms-eval asks test
questions of easy-VQA about images. Both read task files that are written here, as anybody would write them for local
data; the tables that they print are shown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from casp_pl.data.sources import EasyVQA, PydocProse
from casp_pl.data.stream import SampleStream

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
TEXT_TASK = """task: held_out_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
IMAGE_TASK = """task: easy_vqa
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function images.of
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
IMAGES = """from PIL import Image


def of(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def write_task(folder: Path, name: str, task: str, rows: Sequence[dict[str, Any]]) -> None:
    """A task file and its data, a JSON object a line."""
    data = folder / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(task.format(data=data))


def show(command: list[str], folder: Path) -> None:
    """Run one of our commands, and show what it prints last: its table."""
    options = ["--include_path", str(folder), "--device", "cpu", "--output_path", str(folder / "out")]
    environment = os.environ | OFFLINE | {"HF_HOME": str(folder / "cache")}
    print(f"$ python -m casp_pl {' '.join(command)} --include_path ... --device cpu", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "casp_pl", *command, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")), flush=True)


def main() -> None:
    """Write the tasks and run both harnesses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--texts", type=int, default=8)
    options = parser.parse_args()
    texts = islice(SampleStream(PydocProse(), "test", check_images=False), options.texts)
    asked = list(SampleStream(EasyVQA(), "test", check_images=False))
    questions = asked[:: max(1, len(asked) // options.questions)][: options.questions]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images.py").write_text(IMAGES)
        write_task(folder, "held_out_text", TEXT_TASK, [{"text": sample.text} for sample in texts])
        rows = [
            {"question": sample.turns[0].question, "image": str(sample.image), "answer": sample.turns[0].answer}
            for sample in questions
        ]
        write_task(folder, "easy_vqa", IMAGE_TASK, rows)
        model = str(options.run / "model")
        show(["lm_eval", model, "--tasks", "held_out_text"], folder)
        show(["lmms_eval", model, "--tasks", "easy_vqa"], folder)


if __name__ == "__main__":
    main()
