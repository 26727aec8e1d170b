"""What is said where an optional library is missing."""

from __future__ import annotations


def missing(what: str, library: str, extra: str) -> str:
    """What needs which library, and how it is had: by itself, or with an extra of this project."""
    return (
        f"{what} needs {library}, which is not installed: pip install {library}, "
        f"or blastdoor with its extra: pip install 'blastdoor[{extra}]' (in a checkout: pip install '.[{extra}]')"
    )
