"""Errors of kvoffload's own surface. A tier failure is none of these but a miss and a counter."""

from __future__ import annotations


class OffloadError(Exception):
    """Base of all errors raised on purpose by kvoffload."""


class ConfigError(OffloadError, ValueError):
    """An unknown key or a value that is not allowed. One line: key, value, what is allowed."""


class UnsupportedError(OffloadError):
    """The engine is configured with something kvoffload refuses by name at start."""


class StoreError(OffloadError, OSError):
    """The chunk store's directory cannot be opened or used. One line naming the path."""


class ClosedError(OffloadError):
    """The object was closed."""
