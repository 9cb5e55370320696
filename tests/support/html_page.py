"""A page of HTML taken apart, for tests of its structure."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})


class Page(HTMLParser):
    """The document's tree in a few lists; a tag that does not close its own is a fault."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: list[tuple[str | None, list[str]]] = []
        self.headings: list[str] = []
        self.labels: list[str] = []
        self.outside: list[str] = []
        self.is_in_wide = False
        self.feed(text)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td") and self.rows:
            self.rows[-1][1].append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tags.append(tag)
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        self.links += [value or "" for key, value in attributes.items() if key in ("href", "src")]
        if tag == "table" and attributes.get("class") != "facts" and not self.is_in_wide:
            self.outside.append(tag)
        self.is_in_wide = attributes.get("class") == "wide"
        if tag == "tr":
            self.rows.append((attributes.get("class"), []))
        if tag == "svg":
            self.labels.append(attributes.get("aria-label") or "")
