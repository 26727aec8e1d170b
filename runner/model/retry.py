"""Which requests are done again where their worker died: those whose repetition harms nobody."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import ConfigurationError

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """A request whose worker died before a byte of its response's head is done again, by another worker.

    Up to `deaths` times, and only with these `methods` (as they are spelled: RFC 9110, 9.1); its body, if it has one,
    must have been there as a whole. What the handler had done by then, it does again. ConfigurationError for what makes
    no sense.
    """

    deaths: int = 1
    methods: Collection[str] = frozenset({"GET", "HEAD"})

    def __post_init__(self) -> None:
        if isinstance(self.deaths, bool) or not isinstance(self.deaths, int) or self.deaths < 1:
            raise ConfigurationError(f"deaths is how often a request is done again, 1 or more, not {self.deaths!r}")
        if isinstance(self.methods, str) or not all(
            isinstance(method, str) and _TOKEN.fullmatch(method) for method in self.methods
        ):
            raise ConfigurationError(f"methods are names of methods, as in {{'GET', 'HEAD'}}, not {self.methods!r}")
        object.__setattr__(self, "methods", frozenset(self.methods))

    def of(self, method: str) -> int:
        """How often a request of this method may be done again."""
        return self.deaths if method in self.methods else 0
