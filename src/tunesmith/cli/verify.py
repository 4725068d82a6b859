"""``tunesmith verify FOLDER``: compare every file of a model or a run with what was saved."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli import options
from tunesmith.cli.output import Printed, print_result
from tunesmith.json_types import JsonObject


def verify(
    folder: Annotated[
        str, typer.Argument(help="Model, adapter, merged or run folder, or a name in the store.")
    ],
    accept: Annotated[bool, typer.Option("--accept", help="Record a model's files as they are now.")] = False,
    as_json: options.Json = False,
) -> int:
    """Compare every file of a model or a run with its recorded sha256. Exit code 2 if one differs."""
    from tunesmith.train.integrity import verify as verify_folder

    facts = verify_folder(folder, accept)
    print_result(facts, as_json, _lines)
    return 0 if facts["ok"] else 2


def _lines(facts: JsonObject) -> Printed:
    lines = [
        f"{one['state']:12}  {one['path']}" + (f"  ({one['reason']})" if one["reason"] else "")
        for one in facts["files"]
    ]
    bad = sum(one["state"] not in ("ok", "not recorded") for one in facts["files"])
    if not facts["recorded"]:
        verdict = (
            "nothing to compare with: tunesmith did not write this folder (--accept records it as it is now)"
        )
    else:
        verdict = f"{bad} of {len(lines)} differ from what was saved" if bad else "all as saved"
    return "\n".join([*lines, f"{facts['path']}: {verdict}"])
