"""`predict`: streamed answers are those of `generate` on the whole conversation; piped input; what is refused."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from casp_pl.cli import main
from casp_pl.errors import InputError
from casp_pl.models.families import build_family
from casp_pl.models.tiny import load_tiny
from casp_pl.pipeline.chat import Conversation, read_questions


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_a_conversation_is_the_rendered_history() -> None:
    model, processor = load_tiny()
    image = Image.new("RGB", (32, 32), "blue")
    talk = Conversation("tiny", model, processor, image, max_new_tokens=7)
    out = io.StringIO()
    history = ""
    for question in ("what is it?", "sure?", "and now?"):
        answer = talk.ask(question, out)
        shown = "<image>\n" if not history else ""
        history += f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
        inputs = processor(images=[image], text=[history], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=7)[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer == expected
        history += f"{expected}<|im_end|>\n"
    assert out.getvalue().startswith("tiny: ")
    assert answer in out.getvalue()


def test_a_tokenizer_alone_talks_without_images() -> None:
    model, processor = load_tiny()
    processor.tokenizer.chat_template = processor.chat_template
    talk = Conversation("", model, processor.tokenizer, None, max_new_tokens=4)
    out = io.StringIO()
    assert talk.ask("hello", out) == out.getvalue().strip()
    with pytest.raises(InputError, match="text alone"):
        Conversation("", model, processor.tokenizer, Image.new("RGB", (8, 8)), max_new_tokens=4).ask("hello", out)


def test_a_video_is_talked_about() -> None:
    model, processor = build_family("LlavaOnevisionForConditionalGeneration")
    frames = [Image.new("RGB", (24, 20), (20 * number, 0, 0)) for number in range(8)]
    talk = Conversation("", model, processor, None, video=frames, max_new_tokens=5)
    answer = talk.ask("what happens?", io.StringIO())
    prompt = "<|im_start|>user\n<video>\nwhat happens?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(videos=[frames], text=[prompt], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    with pytest.raises(InputError, match="takes text and images alone"):
        Conversation("", *load_tiny(), None, video=frames, max_new_tokens=4).ask("hello", io.StringIO())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_questions_end_with_the_input_or_in_a_terminal_with_a_blank_line() -> None:
    out = io.StringIO()
    assert list(read_questions(io.StringIO("one\n\n two \nthree"), out)) == ["one", "two", "three"]
    assert out.getvalue() == ""
    assert list(read_questions(Terminal("one\n\ntwo\n"), out)) == ["one"]
    assert out.getvalue().count("> ") == 2


def test_piped_questions_are_answered_in_turn(
    recipe: list[str],
    finished_run: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["predict", *recipe, "--run_dir", str(finished_run), "--image", str(picture), "--max_new_tokens", "5"]
    monkeypatch.setattr("sys.stdin", io.StringIO("what colour?\nsure?\n"))
    assert main([*arguments, "--chat"]) == 0
    printed = capsys.readouterr().out
    assert (printed.count("original: "), printed.count("compressed: ")) == (2, 2)
    assert main([*arguments, "--models", "compressed", "--question", "what colour?"]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("compressed: ")
    assert alone in printed
    bare = ["predict", "--image", str(picture), "--max_new_tokens", "5", "--question", "what colour?"]
    for folder in (finished_run, finished_run / "model"):
        assert main([*bare, "--model_dir", str(folder)]) == 0
        assert capsys.readouterr().out == alone, "no recipe is needed"
    assert main([*bare, "--model_dir", str(picture.parent)]) == 3
    assert "holds no model" in capsys.readouterr().err
    assert main([*bare, "--model_dir", str(finished_run), "--video", str(picture.parent)]) == 3
    assert "There is a video, but the model takes text and images alone" in capsys.readouterr().err
    assert main([*bare, "--model_dir", str(finished_run), "--video", "gone.mp4"]) == 3
    assert "--video gone.mp4: no such file" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--question or --chat" in capsys.readouterr().err
    assert main([*arguments, "--chat", "--question", "x"]) == 2


def test_an_ascii_console_shows_and_takes_any_character(
    recipe: list[str], finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    questions = io.TextIOWrapper(io.BytesIO("caf\u00e9?\n".encode()), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr("sys.stdout", answers)
    monkeypatch.setattr("sys.stdin", questions)
    asked = []

    def answer(model: Any, *, input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        asked.append(input_ids)
        streamer.on_finalized_text("\u4f60\u597d", stream_end=True)
        return input_ids

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.generate", answer)
    assert main(["predict", *recipe, "--run_dir", str(finished_run), "--models", "compressed", "--chat"]) == 0
    answers.flush()
    assert answers.buffer.getvalue() == b"compressed: \\u4f60\\u597d\n"
    assert "caf\u00e9?" in load_tiny()[1].tokenizer.decode(asked[0][0])
