"""Corpus figures from the sums that evaluation keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def token_mean(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """{"eval_loss", "eval_loss_stderr", "perplexity"} from records {"rows": [(sum of losses, tokens) of each row]}.

    ``eval_loss`` is the mean over all tokens, NaN when there are none. Tokens of one row are not independent of each other,
    rows are: so the standard error is that of a ratio of two sums over rows (Cochran, Sampling Techniques, 1977, eq. 6.10),
    sqrt(m / (m - 1) * sum_i (loss_i - eval_loss * tokens_i)^2) / sum_i tokens_i. It is left out below two rows. Sums of whole
    rows, added exactly: neither figure depends on how rows were batched.
    """
    rows = [row for record in records for row in record["rows"]]
    targets = sum(count for _, count in rows)
    mean = math.fsum(loss for loss, _ in rows) / targets if targets else math.nan
    figures = {"eval_loss": mean}
    if len(rows) > 1:
        squares = math.fsum((loss - mean * count) ** 2 for loss, count in rows)
        figures["eval_loss_stderr"] = math.sqrt(len(rows) / (len(rows) - 1) * squares) / targets
    return {**figures, "perplexity": math.exp(mean) if mean < 700 else math.inf}


def by_row(records: Sequence[dict[str, Any]]) -> list[tuple[tuple[int, int], list[dict[str, Any]]]]:
    """(row, its windows) in the order of rows, from records {"windows": [{"row": (source, row of the file), ...}, ...]}."""
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in records:
        for window in record["windows"]:
            rows.setdefault(window["row"], []).append(window)
    return sorted(rows.items())
