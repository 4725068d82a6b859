"""The recipe: what a run is, as YAML, strictly checked.

In reading order: ``schema`` (the keys), ``text`` (YAML with line numbers, overrides), ``validation`` (from a
file to a Recipe), ``foreign_keys`` and ``foreign_values`` (what other programs call them), ``conflicts``
(choices that contradict each other).
"""

from tunesmith.recipe.conflicts import conflicts
from tunesmith.recipe.schema import DEFAULT_OBJECTIVE, Recipe, brief, changed
from tunesmith.recipe.validation import flag_advice, load, parse, read_file, resolve

__all__ = [
    "DEFAULT_OBJECTIVE",
    "Recipe",
    "brief",
    "changed",
    "conflicts",
    "flag_advice",
    "load",
    "parse",
    "read_file",
    "resolve",
]
