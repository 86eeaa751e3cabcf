"""English prose that every Python installation carries: the language reference in `pydoc_data.topics`.

Only paragraphs of running text are taken: code, grammar, tables, headings and signatures are left out, lines are
unwrapped. Topics repeat each other, so topics that share a paragraph form one family; a family goes as a whole to the
calibration part or to the held-out part, and no paragraph is taken twice.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping

from casp_pl.data.sample import Sample
from casp_pl.data.sources.base import DataSource, Row, Split

__all__ = ["PydocProse", "prose_paragraphs"]

_MIN_CHARACTERS = 80
_MIN_LETTERS = 0.85
_MIN_STOPWORDS = 0.25
_MARKUP = re.compile(r"::=|>>>|\*\*\*|---|===|\+-")
_BULLET = re.compile(r"^(\*|\d+\.) ")
_STOPWORDS = re.compile(
    r"(a|an|and|are|as|at|be|by|can|for|from|has|have|if|in|is|it|its|may|not|of|on|or|that|the|this|to|was|when|which"
    r"|will|with)",
    re.IGNORECASE,
)


class PydocProse(DataSource):
    """Prose of Python's language reference, one sample per topic.

    Args:
        held_out: share of the characters that goes to the test split.
    """

    def __init__(self, *, held_out: float = 0.25) -> None:
        self.held_out = held_out

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """The topics of the split by name; the split depends on the Python version, and on nothing else."""
        from pydoc_data.topics import topics

        paragraphs = {name: prose_paragraphs(text) for name, text in sorted(topics.items())}
        families = _families(paragraphs)
        held_out = _choose_held_out(families, paragraphs, self.held_out)
        chosen = [family for family in families if (family[0] in held_out) == (split == "test")]
        samples = []
        for family in chosen:
            seen: set[str] = set()
            for name in family:
                fresh = [paragraph for paragraph in paragraphs[name] if paragraph not in seen]
                seen.update(fresh)
                if fresh:
                    samples.append(Sample(id=f"pydoc/{name}", text="\n\n".join(fresh)))
        return iter(sorted(samples, key=lambda sample: sample.id)[start:])


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs of running English in `text`, unwrapped, without repetitions."""
    paragraphs = (_BULLET.sub("", " ".join(part.split())) for part in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(paragraph for paragraph in paragraphs if _is_prose(paragraph)))


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < _MIN_CHARACTERS or paragraph[-1] not in ".:;?!)" or _MARKUP.search(paragraph):
        return False
    words = re.findall(r"[A-Za-z']+", paragraph)
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    stopwords = sum(_STOPWORDS.fullmatch(word) is not None for word in words)
    starts_a_sentence = re.match(r'["*(]?[A-Z]', paragraph) is not None
    return starts_a_sentence and letters >= _MIN_LETTERS * len(paragraph) and stopwords >= _MIN_STOPWORDS * len(words)


def _families(paragraphs: Mapping[str, list[str]]) -> list[list[str]]:
    """Topics that share a paragraph, directly or through others, in one sorted list each."""
    family_of = {name: [name] for name in paragraphs}
    owner: dict[str, str] = {}
    for name, texts in paragraphs.items():
        for text in texts:
            mine, other = family_of[name], family_of[owner.setdefault(text, name)]
            if mine is not other:
                mine.extend(other)
                family_of.update(dict.fromkeys(mine, mine))
    return [sorted(family) for name, family in family_of.items() if name == min(family)]


def _choose_held_out(families: list[list[str]], paragraphs: Mapping[str, list[str]], share: float) -> set[str]:
    """First names of the held-out families: in an order given by a hash, each taken if it still fits in the share."""
    sizes = {family[0]: sum(len(text) for name in family for text in paragraphs[name]) for family in families}
    room = share * sum(sizes.values())
    chosen = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if sizes[name] <= room:
            room -= sizes[name]
            chosen.add(name)
    return chosen
