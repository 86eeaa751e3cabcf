"""What README and docs show: examples run, commands parse, messages exist, links lead somewhere, pages are in the nav.

An example is a fenced block behind `<!-- runnable -->`: bash (commands of casp_pl), yaml (an overlay) or python. Those
of a page run one after the other in one directory, which has the configs and a finished run, `runs/tiny`. The other
commands of `ON_THE_TINY_MODEL` run there as well, on the tiny model, but for fits; those of all pages are parsed.
"""

import io
import re
import shlex
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image

from casp_pl.cli import build_parser, main, recipe_parsers
from casp_pl.data.sources import EasyVQA
from casp_pl.harness import HARNESSES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = re.compile(r"<!-- runnable -->\n```(bash|yaml|python)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^ *(?:\$ |srun .*)?(?:torchrun .*?-m|python -m) casp_pl ((?:[^\n\\]|\\\n)*)", re.MULTILINE)
PLACEHOLDERS = {"--config ... --": "--config RECIPE --", "--key value": "", "OVERLAY ...": "configs/models/tiny.yaml"}
RECIPE = "configs/llava_aqlm.yaml"
ON_THE_TINY_MODEL = [ROOT / name for name in ("README.md", "docs/evaluation.md", "docs/planning.md")]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(#[^)]*)?\)")


class Example(NamedTuple):
    """A block that is to run."""

    page: Path
    language: str
    text: str


EXAMPLES = [Example(page, *found) for page in PAGES for found in RUNNABLE.findall(page.read_text(encoding="utf-8"))]


@pytest.fixture
def desk(tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in, with what a clone has."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(finished_run, tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted({example.page for example in EXAMPLES}), ids=lambda page: page.name)
def test_examples_run(page: Path, desk: Path) -> None:
    for _, language, text in [example for example in EXAMPLES if example.page == page]:
        if language == "python":
            exec(compile(text, str(page), "exec"), {"__name__": "__main__"})
        elif language == "yaml":
            (desk / "overlay.yaml").write_text(text)
            recipe = "configs/llava_gptq.yaml" if "granularity" in text else "configs/llava_aqlm.yaml"
            build_parser().parse_args(["fit", "--config", recipe, "--config", "overlay.yaml"])
        else:
            for command in text.replace("\\\n", " ").strip().splitlines():
                words = shlex.split(command, comments=True)
                assert words[:3] == ["python", "-m", "casp_pl"], "only our own commands run in tests"
                assert main(words[3:]) == 0, command


def test_there_are_examples_of_every_kind() -> None:
    kinds = [example.language for example in EXAMPLES]
    assert len(kinds) >= 12
    assert {"bash", "yaml", "python"} == set(kinds)


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, with something in the place of placeholders."""
    texts = [found.replace("\\\n", " ") for found in COMMAND.findall(page.read_text(encoding="utf-8"))]
    for pattern, meant in PLACEHOLDERS.items():
        texts = [text.replace(pattern, meant) for text in texts]
    words = [shlex.split(re.sub(r"[\[\]]", " ", text), comments=True) for text in texts]
    return [
        [RECIPE if word in ("...", "RECIPE") else word for word in command if word != "my.yaml"] for command in words
    ]


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    return build_parser()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path, parser: LightningArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words[0] not in HARNESSES:  # these run below
            assert parser.parse_args(words).subcommand == words[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", ON_THE_TINY_MODEL, ids=lambda page: page.name)
def test_commands_run_on_the_tiny_model(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk / "runs/tiny").rename(desk / "runs/llava_aqlm")
    Image.new("RGB", (40, 30), "red").save(desk / "cat.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n"))
    rows = EasyVQA.rows
    few = {"train": None, "test": 20}
    monkeypatch.setattr(EasyVQA, "rows", lambda self, split, start=0: islice(rows(self, split, start), few[split]))
    recipes = recipe_parsers()
    for words in commands(page):
        if words[0] in ("fit", *HARNESSES) or any("benchmark" in word or "evaluation/" in word for word in words):
            continue  # a fit runs in docs/index.md, a benchmark in tests/pipeline/test_side_by_side.py
        tiny = ["--config", "configs/models/tiny.yaml"] if words[0] in recipes else []
        words = [word.replace("layers.3.", "layers.1.") for word in words]  # the tiny model has two
        assert main([*words, *tiny]) == 0, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_harnesses_are_called_as_shown(
    page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [words for words in commands(page) if words[0] in HARNESSES]
    if not shown:
        return
    desk: Path = request.getfixturevalue("desk")
    (desk / "runs/tiny").rename(desk / "runs/llava_aqlm")
    calls: list[list[str]] = []
    for name in HARNESSES:
        monkeypatch.setitem(HARNESSES, name, lambda: lambda: calls.append(sys.argv))
    for words in shown:
        assert main(words) == 0, words
    model = ["--model", "casp", "--model_args", "pretrained=runs/llava_aqlm/model"]
    assert calls == [[words[0], *model, *words[2:]] for words in shown]
    assert all(words[2] == "--tasks" for words in shown)


def test_the_site_asks_no_other_server() -> None:
    assert "://" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_messages_of_the_troubleshooting_page_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "casp_pl").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that go on in the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    messages = [message for row in rows for message in re.findall("`(.*?)`", row)]
    assert len(messages) > 25
    patterns = {message: re.escape(message).replace(r"\.\.\.", ".{1,80}") for message in messages}
    missing = [message for message, pattern in patterns.items() if not re.search(pattern, source)]
    missing = [message for message in missing if message != "is not expected"]  # jsonargparse's
    assert missing == []


def test_links_lead_to_files() -> None:
    dead = [
        f"{page.name}: {target}"
        for page in PAGES
        for target, _ in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert dead == []


def test_every_page_is_in_the_navigation() -> None:
    def entries(value: object) -> list[str]:
        if isinstance(value, dict):
            return [name for item in value.values() for name in entries(item)]
        return [name for item in value for name in entries(item)] if isinstance(value, list) else [str(value)]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(entries(settings["nav"])) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
