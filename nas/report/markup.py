"""Small HTML builders that escape whatever they are given unless it is marked as HTML already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


def safe(value: object) -> Html:
    """The value as HTML: as it is if marked, else its text with every special character escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """One element; an attribute named ``class_`` becomes ``class``."""
    pairs = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{pairs}>{''.join(map(safe, content))}</{name}>")


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, marked: Sequence[str] = (), class_: str = ""
) -> Html:
    """A table that scrolls sideways when it must; ``marked`` gives each row's class, the first cell is its heading."""
    classes = [*marked]
    top = tag("tr", *(tag("th", text, scope="col") for text in head))
    body = []
    for i, (first, *cells) in enumerate(rows):
        line = (tag("th", first, scope="row"), *(tag("td", cell) for cell in cells))
        body.append(tag("tr", *line, class_=classes[i] if i < len(classes) else ""))
    whole = tag("table", tag("thead", top), tag("tbody", *body), class_=class_)
    return tag("div", whole, class_="scroll")


def pairs(items: Iterable[tuple[str, object]]) -> Html:
    """A list of names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in items))


def paragraphs(sentences: Iterable[str], class_: str = "") -> Html:
    """One paragraph per sentence."""
    return Html("".join(tag("p", text, class_=class_) for text in sentences))


def bullets(items: Iterable[object]) -> Html:
    """A bulleted list."""
    return tag("ul", *(tag("li", item) for item in items))
