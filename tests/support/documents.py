# SPDX-License-Identifier: Apache-2.0
"""The documents: their blocks of commands, with where each is said to be run, and the commands within their text.

A block of shell commands has a line `<!-- run: WHERE -->` before it, or is in a document that has one place for all:

- `make`: targets of the Makefile;
- `lab`: in the lab that `make lab` makes, on its first node;
- `reading`: the same, but only the lines that are commands of ours: the others belong to a real node or cluster;
- `dist`: in a clone, as any other program of the repository;
- `cluster`: kubectl and helm, of which only what can be checked without a cluster is checked;
- `parsed`: not run; the commands and options are there;
- `elsewhere, …`: by what is named there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("make", "lab", "reading", "dist", "cluster", "parsed", "elsewhere")
_WHOLE = {"docs/cli.md": "parsed", "docs/runbooks.md": "reading", "docs/troubleshooting.md": "reading"}
_MARK = r"(?:<!-- run: (?P<where>.*?) -->\n)?"
_BLOCK = re.compile(_MARK + r"```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of shell commands; `where` is as it is written, empty when nothing is."""

    document: str
    line: int
    where: str
    text: str

    @property
    def place(self) -> str:
        return self.where.partition(",")[0]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """All that users read, but the transcript, which is generated, and the history."""
    names = ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md")
    found = [*(ROOT / name for name in names), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("vagrant/*.md"))]
    return [path for path in found if not path.name.startswith("transcript")]


def blocks() -> Iterator[Block]:
    for path in documents():
        text = path.read_text()
        for match in _BLOCK.finditer(text):
            if match["language"] in ("sh", "bash", "console", "shell"):
                line = text[: match.start()].count("\n") + 1
                name = str(path.relative_to(ROOT))
                yield Block(name, line, match["where"] or _WHOLE.get(name, ""), match["text"])


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """(where, words after the program's name) of each command in the text, within a line of code."""
    for path in documents():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for code in _CODE.findall(line):
                for one in re.split(r"\s*(?:\||&&|;|\|\|)\s*", code):
                    words = one.split()
                    if words[:1] == ["sudo"]:
                        del words[0]
                    if len(words) > 1 and words[0] == program:
                        yield f"{path.relative_to(ROOT)}:{number}", words[1:]


def links() -> Iterator[tuple[Path, str]]:
    """(document, target) of each link within the repository."""
    for path in documents():
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target in _LINK.findall(text):
            yield path, target


def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as the usual renderers make them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    found = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in _HEADING.findall(text))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in found}
