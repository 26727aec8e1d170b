"""Raises, when it is imported, what can't be shown or pickled."""

from tests.handlers import Unprintable

raise Unprintable(lambda: None)
