"""What the build of the documentation does beyond MkDocs (`scripts/docs`, `mkdocs.yml`).

It takes in the pages that stand at the project's root, whose links are written for a code host, and it warns, which
fails a strict build, of public names that the API page leaves out, or that have no docstring.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.documentation")

ROOT: Final = Path(__file__).parents[1]

PAGES: Final = {
    "README.md": "overview.md",  # MkDocs takes a README for an index
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages of the project's root that are part of the site, and their names there."""

_LINK: Final = re.compile(r"\]\((?:\.\./|docs/)?([A-Za-z]+\.md)(?=[)#])")

MODULES: Final = (
    "runner",
    "runner.cluster",
    "runner.events",
    "runner.metrics",
    "runner.traces",
    "transport",
    "transport.gateway",
    "transport.httpx",
    "transport.httpx2",
    "transport.requests",
)
"""Modules whose public names are documented: those of `__all__`, or those that they define."""

ELSEWHERE: Final = {
    "runner.events.Events": "what a pool has within it: `Pool.subscribe` is the way to it",
    "transport.BlastdoorError": "the same as runner.BlastdoorError",
    "transport.CancelScope": "the same as runner.CancelScope",
    "transport.requests.RawResponse": "what `response.raw` is: a urllib3.HTTPResponse to its users",
}
"""Public names that the API page does not have, and why."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the pages of the project's root."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between the root and `docs/` to where the pages stand on the site."""
    return _LINK.sub(lambda link: f"]({PAGES.get(link[1], link[1])}", markdown)


def on_pre_build(config: MkDocsConfig) -> None:
    """Warn of gaps in the API page."""
    listed = set(re.findall(r"^::: (\S+)", Path(config.docs_dir, "api.md").read_text(), re.MULTILINE))
    for name in sorted(set(public_names()) - set(ELSEWHERE) - listed):
        logger.warning("api.md leaves out the public name %s", name)
    for name in sorted(listed):
        for bare in undocumented(name):
            logger.warning("the public name %s has no docstring", bare)


def public_names() -> Iterator[str]:
    """The full names of all that is public."""
    for module in map(importlib.import_module, MODULES):
        yield from (f"{module.__name__}.{name}" for name in getattr(module, "__all__", None) or _defined(module))


def _defined(module: Any) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def undocumented(name: str) -> Iterator[str]:
    """Of a public name and the public attributes of its class those without a docstring, inherited ones counted."""
    home, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(home), attribute)
    if not inspect.getdoc(value):
        yield name
    if inspect.isclass(value):
        for member, found in inspect.getmembers_static(value):
            function = getattr(found, "fget", None) or getattr(found, "__func__", found)
            ours = inspect.isfunction(function) and function.__module__.startswith(("runner", "transport"))
            if ours and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                yield f"{name}.{member}"
