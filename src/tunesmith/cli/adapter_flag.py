"""``--adapter NAME=FOLDER`` of ``chat`` and ``generate``: several adapters of one base."""

from __future__ import annotations

import re

from tunesmith.errors import UserError

BASE = "base"
"""The name of the model without any adapter, as in ``models.adapters.adapter_set``."""


def parse_adapters(given: list[str]) -> dict[str, str]:
    """Parse ``NAME=FOLDER`` options into name -> folder. Raises UserError."""
    folders: dict[str, str] = {}
    for option in given:
        name, equals, folder = option.partition("=")
        if not (name.isidentifier() and equals and folder) or name in (*folders, BASE):
            raise UserError(
                f"--adapter {option}: expected NAME=FOLDER; a name has letters and digits, is used once, and is not `base`"
            )
        folders[name] = folder
    return folders


def with_adapter_of_model(model: str, folders: dict[str, str]) -> dict[str, str]:
    """Add MODEL itself, under its folder's name, if it is an adapter and there are others to switch to."""
    from tunesmith.models.find.locate import locate

    if not folders:
        return folders
    located = locate(model)
    if located.kind != "adapter":
        return folders
    name = re.sub(r"\W", "_", (located.run or located.path).name)
    while name in (*folders, BASE):
        name += "_"
    return {name: model, **folders}
