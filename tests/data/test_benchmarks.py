"""Small files in the formats that the benchmarks publish: prompts letter by letter, answers, images, categories."""

import json

import pytest

from casp_pl.data.benchmarks import GQA, MME, POPE, ScienceQA, SEEDBench, TextVQA, VQAv2
from casp_pl.errors import ConfigError, InputError

SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{options}\nAnswer with the option's letter from the given choices directly."


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def shown(sample):
    """What a test compares: prompt, answers, image name, category."""
    return sample.turns[0].question, sample.answers, sample.image.name, sample.category


def test_pope(tmp_path):
    for number, kind in enumerate(("random", "adversarial")):
        rows = [
            {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a dog in the image?", "label": "yes"},
            {"question_id": 2, "image": "COCO_val2014_1.jpg", "text": f"Is there a {number}?", "label": "no"},
        ]
        write(tmp_path / f"coco_pope_{kind}.json", "".join(json.dumps(row) + "\n" for row in rows))
    samples = POPE(path=tmp_path, image_folder=tmp_path, prompt=SHORT).load("test")
    assert [sample.id for sample in samples][:3] == ["pope/adversarial/1", "pope/adversarial/2", "pope/random/1"]
    prompt = "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    assert shown(samples[0]) == (prompt, ("yes",), "COCO_val2014_1.jpg", "adversarial")
    assert len(POPE(path=tmp_path / "coco_pope_random.json", image_folder=tmp_path).load("test")) == 2


def test_gqa(tmp_path):
    row = {"question": "Is it overcast?", "imageId": "n161313", "answer": "no", "types": {"structural": "verify"}}
    path = write(tmp_path / "q.json", {"201307251": row})
    (sample,) = GQA(path=path, image_folder=tmp_path).load("test")
    assert shown(sample) == ("Is it overcast?", ("no",), "n161313.jpg", "verify")


@pytest.mark.parametrize("column", ["question", "answer"])
def test_half_a_surrogate_pair_ends_the_evaluation(column, tmp_path):
    row = {"question": "Is it overcast?", "imageId": "n161313", "answer": "no"}
    path = write(tmp_path / "q.json", {"201307251": row | {column: "\ud83d"}})
    with pytest.raises(InputError, match=r"GQA: .*one half of a surrogate pair in the text \(\\ud83d\)"):
        GQA(path=path, image_folder=tmp_path).load("test")


@pytest.mark.parametrize("apart", [True, False])
def test_mme(apart, tmp_path):
    folder = tmp_path / "count"
    texts, images = (folder / "questions_answers_YN", folder / "images") if apart else (folder, folder)
    lines = "Is there a cat? Please answer yes or no.\tYes\nIs there a car? Please answer yes or no.\tNo\n"
    write(texts / "0006.txt", lines)
    write(images / "0006.png", "")
    first, second = MME(path=tmp_path, prompt=SHORT).load("test")
    prompt = "Is there a cat?\nAnswer the question using a single word or phrase."
    assert shown(first) == (prompt, ("Yes",), "0006.png", "count")
    assert second.answers == ("No",)
    assert MME(path=tmp_path, short=False).load("test")[1].turns[0].question.endswith("Please answer yes or no.")
    write(texts / "0007.txt", lines)
    with pytest.raises(InputError, match="0007"):
        MME(path=tmp_path).load("test")


def test_science_qa(tmp_path):
    plain = {"question": "Which is farthest north?", "choices": ["Ohio", "Utah", "Iowa"], "answer": 1, "hint": ""}
    row = plain | {"image": "image.png", "subject": "social science"}
    problems = {"5": row, "6": plain | {"image": None}, "7": row | {"hint": "Look at the map."}, "8": row}
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"test": ["5", "6", "7"], "train": ["8"]})
    prompt = "{context}{question}\n" + LETTER
    first, second = ScienceQA(path=tmp_path, image_folder=tmp_path / "images", prompt=prompt).load("test")
    text = (
        "Which is farthest north?\nA. Ohio\nB. Utah\nC. Iowa\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert shown(first) == (text, ("B",), "image.png", "social science")
    assert first.image == tmp_path / "images/test/5/image.png"
    assert second.turns[0].question == f"Context: Look at the map.\n{text}"


def test_seed_bench(tmp_path):
    row = {"question_id": "101669", "question": "How many?", "answer": "C", "data_id": "14_25", "data_type": "image"}
    row |= {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "question_type_id": 5}
    content = {"questions": [row, row | {"data_type": "video"}], "question_type": {"Instances Counting": 5}}
    path = write(tmp_path / "SEED-Bench.json", content)
    (sample,) = SEEDBench(path=path, image_folder=tmp_path, prompt="{question}\n" + LETTER).load("test")
    text = (
        "How many?\nA. One\nB. Two\nC. Three\nD. Four\nAnswer with the option's letter from the given choices directly."
    )
    assert shown(sample) == (text, ("C",), "14_25", "Instances Counting")


def test_text_vqa(tmp_path):
    answers = ["nokia"] * 4 + ["Nokia"] * 5 + ["none"]
    row = {"question_id": 34602, "image_id": "003a", "question": "what is the brand?", "answers": answers}
    path = write(tmp_path / "val.json", {"data": [row]})
    words = write(tmp_path / "ocr.json", {"data": [{"image_id": "003a", "ocr_tokens": ["NOKIA", "3310"]}]})
    prompt = "{question}\n{ocr}Answer the question using a single word or phrase."
    (sample,) = TextVQA(path=path, image_folder=tmp_path, prompt=prompt, ocr_path=words).load("test")
    text = "What is the brand?\nReference OCR token: NOKIA, 3310\nAnswer the question using a single word or phrase."
    assert shown(sample) == (text, tuple(answers), "003a.jpg", "")
    assert sample.turns[0].answer == "Nokia"
    (sample,) = TextVQA(path=path, image_folder=tmp_path, prompt=prompt).load("test")
    assert sample.turns[0].question == "What is the brand?\nAnswer the question using a single word or phrase."


def test_vqa_v2(tmp_path):
    questions = [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}]
    answers = [{"answer": text, "answer_id": number} for number, text in enumerate(["down"] * 9 + ["up"])]
    annotation = {"question_id": 262148000, "image_id": 262148, "answer_type": "other", "answers": answers}
    path = write(tmp_path / "q.json", {"questions": questions})
    answered = write(tmp_path / "a.json", {"annotations": [annotation]})
    (sample,) = VQAv2(path=path, annotations=answered, image_folder=tmp_path).load("test")
    assert shown(sample) == ("Where is he looking?", (*["down"] * 9, "up"), "COCO_val2014_000000262148.jpg", "other")


def test_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        GQA(path=tmp_path / "none.json", image_folder=tmp_path).load("test")
    path = write(tmp_path / "coco_pope_random.json", '{"question_id": 1}\n')
    with pytest.raises(InputError, match="POPE: the file is not what the benchmark publishes .KeyError"):
        POPE(path=tmp_path, image_folder=tmp_path).load("test")
    write(path, '\n{"question_id": \n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        POPE(path=tmp_path, image_folder=tmp_path).load("test")
    write(path, "")
    with pytest.raises(InputError, match="no question"):
        POPE(path=tmp_path, image_folder=tmp_path).load("test")
    with pytest.raises(ConfigError, match=r"evaluation\.source"):
        POPE(path=tmp_path, image_folder=tmp_path).load("train")


@pytest.mark.parametrize("prompt", ["Answer shortly.", "{question} {options}", "{question", "{question.__class__}"])
def test_prompts_need_the_question_and_nothing_unknown(prompt, tmp_path):
    with pytest.raises(ConfigError, match="prompt"):
        GQA(path=tmp_path, image_folder=tmp_path, prompt=prompt)
