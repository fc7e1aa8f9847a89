"""The version: written here and nowhere else. Packaging reads this file, the package imports it."""

from __future__ import annotations

__version__ = "2.0.0.dev0"
VERSION: tuple[int, ...] = tuple(int(part) for part in __version__.split(".")[:3])
