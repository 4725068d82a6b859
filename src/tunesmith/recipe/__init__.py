"""The recipe: what a run is, as YAML, strictly checked.

In reading order: ``schema`` (the keys, and how a file becomes a Recipe), ``text`` (YAML with line numbers, overrides).
"""

from tunesmith.recipe.schema import Recipe, Strict, brief, changed, conflicts, load, parse

__all__ = ["Recipe", "Strict", "brief", "changed", "conflicts", "load", "parse"]
