"""Process titles, where setproctitle is installed: `blastdoor: worker /shop` in ps and top."""

from __future__ import annotations


def set_title(role: str, label: str) -> None:
    """Call this process by its role, and what its pool is called."""
    try:
        from setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(f"blastdoor: {role} {label}".rstrip())
