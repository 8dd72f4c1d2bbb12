"""Importing this module registers the fakes, as a plugin package would its backends."""

from .fakes import register

register()
