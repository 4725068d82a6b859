"""The format of a file of prompts, whose rows may lack their answers."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.formats.column_advice import columns_of
from tunesmith.data.formats.columns import Converter, candidates
from tunesmith.data.formats.fields import Columns
from tunesmith.data.rows import Prompt
from tunesmith.errors import DataError


def choose_prompt_converter(
    keys: Sequence[tuple[str, ...]],
    path: str,
    accepted: tuple[type, ...],
    format: str | None,
    columns: Columns | None,
    prompt_template: str | None,
) -> Converter:
    """Choose the format of prompts: the one that reads the most columns. Where the rows have no answers, that
    format must make rows of a type in ``accepted``, or context would be lost. Raises DataError."""
    pairs = candidates(keys, path, format, columns, prompt_template)
    if format is None and accepted != (Prompt,):  # formats with an answer read the same prompts
        pairs = [pair for pair in pairs if pair[0].row is not Prompt]
    for needs_gold in (True, False):
        makers = [
            Converter(form, mapped, prompt_template, needs_gold, prompts=True) for form, mapped in pairs
        ]
        fitting = [maker for maker in makers if 2 * maker.count(keys) >= len(keys)]
        fitting.sort(key=lambda maker: -max(len(maker.match(row)[0]) for row in keys))  # stable
        wanted = [maker for maker in fitting if maker.row_types & set(accepted)]
        if wanted and (needs_gold or wanted[0] is fitting[0]):
            return wanted[0]
        if fitting:
            break
    found = "no column is a prompt"
    if fitting:
        found = f"its rows are read as {fitting[0].form.name}, which are not prompts"
    raise DataError(
        f"{path}: {found}. Columns of the file: {', '.join(columns_of(keys[:5])) or 'none'}.\n"
        "  Name the column of the prompt with --column prompt=COLUMN, or those of an instruction and its context with "
        "--column instruction=COLUMN --column input=COLUMN."
    )
