"""A hook of mkdocs: formulas become MathML when a page is built: reading needs no script, no other server."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """`html` with what arithmatex has marked as MathML."""
    return _MARKED.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    return convert(unescape(found[3]).strip(), display="inline" if found[2] == "(" else "block")
