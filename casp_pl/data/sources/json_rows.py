"""The rows of a JSON list or of JSON lines, one after another, whatever the size of the file."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from casp_pl.errors import InputError

__all__ = ["JsonRow", "json_rows"]

_CHUNK = 1 << 20  # characters read at a time


class JsonRow(NamedTuple):
    """A row, and where it stands.

    Attributes:
        place: file, and line or number of the row.
        value: what is there.
        problem: why there is nothing, of a line that is not JSON; else empty.
    """

    place: str
    value: Any = None
    problem: str = ""


def json_rows(path: Path, start: int = 0) -> Iterator[JsonRow]:
    """The rows from number `start` on: the lines of a .jsonl file that are not blank, the elements of any other's list.

    A line that is not JSON is a row with a problem. What stands behind a broken element of a list cannot be told.

    Raises:
        InputError: no such file, not a list, or one that is broken; with the path, and the number of the row.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                yield from _lines(file, path, start)
            else:
                elements = islice(enumerate(_elements(file)), start, None)
                yield from (JsonRow(f"{path}, row {number}", element) for number, element in elements)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Cannot read {path}: {str(error).splitlines()[0]}") from error


def _lines(file: TextIO, path: Path, start: int) -> Iterator[JsonRow]:
    filled = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    for number, line in islice(filled, start, None):
        place = f"{path}, line {number}"
        try:
            row = JsonRow(place, json.loads(line))
        except (ValueError, RecursionError) as error:
            row = JsonRow(place, problem=f"not JSON ({error})")
        yield row


def _elements(file: TextIO) -> Iterator[Any]:
    """The elements of the list that the file holds.

    Raises:
        ValueError: it holds something else.
    """
    decoder = json.JSONDecoder()
    text, number = "", 0
    while not text and (more := file.read(_CHUNK)):
        text = more.lstrip("\ufeff \t\r\n")
    if not text.startswith("["):
        raise ValueError("not a list of rows")
    text = text[1:].lstrip()
    while number or not text.startswith("]"):
        try:
            element, end = decoder.raw_decode(text)
            rest, reason = text[end:].lstrip(), "the list is cut off, or a comma is missing"
        except ValueError as error:
            rest, reason = "", str(error)
        if rest[:1] not in ("]", ",") or not rest:  # what ends with the chunk may go on in the next one
            more = file.read(max(_CHUNK, len(text)))
            if not more:
                raise ValueError(f"row {number}: {reason}")
            text = (text + more).lstrip()
            continue
        yield element
        number += 1
        text = rest
        if text.startswith("]"):
            break
        text = text[1:].lstrip()
    if (text[1:] + file.read()).strip():
        raise ValueError("something stands behind the list")
