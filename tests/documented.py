"""The fenced code blocks of the README and of docs/, each with where it stands and the files that it may use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]

PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r'^ *```(\S*)(?: title="([^"]+)")?\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, its title (the file that it is, or empty), and its text."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def files(self) -> list[Block]:
        """The blocks with a title that come before it: those of its page, and on docs/'s pages the example app's."""
        shared = [] if self.page.name == "README.md" else blocks_of(ROOT / "docs" / "index.md")
        own = [block for block in blocks_of(self.page) if block.line < self.line]
        return [block for block in (*shared, *own) if block.title]

    @property
    def needs_cluster(self) -> bool:
        """Whether it runs on a Ray cluster."""
        return "ClusterPool" in self.text

    def check_output(self, printed: str) -> None:
        """What the comments `# -> text` say is what it has printed, in their order."""
        for expected in re.findall(r"# -> (.+)", self.text):
            assert expected in printed
            printed = printed[printed.index(expected) + len(expected) :]

    def write_files(self, directory: Path) -> None:
        """Write what it may use to a directory."""
        for block in self.files:
            file = directory / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    text = page.read_text()
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2] or "", match[3])
        for match in _FENCE.finditer(text)
    ]
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(found), f"{page}: a block was not understood"
    return found


def blocks(*languages: str, titled: bool | None = None) -> list[Block]:
    """The blocks of all pages in some languages; with a title, without, or both."""
    return [
        block
        for page in PAGES
        for block in blocks_of(page)
        if block.language in languages and (titled is None or titled == bool(block.title))
    ]


def commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a block of a shell's, each with its output: where it has prompts, those are the commands."""
    prompts = block.language == "console"
    found: list[tuple[str, str]] = []
    for line in re.sub(r" *\\\n *", " ", block.text).splitlines(keepends=True):
        if not prompts and line.strip() and not line.startswith("#"):
            found.append((line.strip(), ""))
        elif prompts and line.startswith("$ "):
            found.append((line[2:].strip(), ""))
        elif prompts:
            command, output = found.pop()
            found.append((command, output + line))
    return found
