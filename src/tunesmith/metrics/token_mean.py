"""Loss and perplexity over a corpus, from the sums that evaluation keeps for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunesmith.json_types import JsonObject
from tunesmith.metrics.intervals import Place


def token_mean(records: Sequence[JsonObject]) -> dict[str, float]:
    """Return eval_loss, eval_loss_stderr and perplexity.

    The records are {"rows": [(sum of losses, tokens) of each example], "places": [the row of each]}. Without
    ``places`` each example is a row; otherwise the blocks of one document and the turns of one conversation are.
    ``eval_loss`` is the mean over all tokens, nan when there are none. Its standard error is that of a ratio
    of two sums over rows, because rows are independent of each other and the tokens of one row are not
    (Cochran, Sampling Techniques, 1977, eq. 6.10): sqrt(m / (m - 1) * sum_i (loss_i - eval_loss *
    tokens_i)^2) / sum_i tokens_i. It is left out below two rows. Sums are exact: no metric depends on how rows were
    batched.
    """
    examples = [one for record in records for one in record["rows"]]
    rows = list(sums_by_row(records).values()) if all("places" in one for one in records) else examples
    targets = sum(count for _, count in examples)
    mean = math.fsum(loss for loss, _ in examples) / targets if targets else math.nan
    metrics = {"eval_loss": mean}
    if len(rows) > 1:
        squares = math.fsum((loss - mean * count) ** 2 for loss, count in rows)
        metrics["eval_loss_stderr"] = math.sqrt(len(rows) / (len(rows) - 1) * squares) / targets
    return {**metrics, "perplexity": math.exp(mean) if mean < 700 else math.inf}


def sums_by_row(records: Sequence[JsonObject]) -> dict[Place, tuple[float, float]]:
    """Return (sum of losses, tokens) of each row: of all blocks of a document, of all turns of a conversation."""
    parts: dict[Place, list[tuple[float, float]]] = {}
    for record in records:
        for place, part in zip(record["places"], record["rows"], strict=True):
            parts.setdefault(place, []).append(part)
    return {
        place: (math.fsum(loss for loss, _ in known), math.fsum(tokens for _, tokens in known))
        for place, known in parts.items()
    }


def windows_by_row(records: Sequence[JsonObject]) -> list[tuple[tuple[int, int], list[JsonObject]]]:
    """Return (row, its windows) in the order of rows.

    The records are {"windows": [{"row": (source, row of the file), ...}, ...]}.
    """
    rows: dict[tuple[int, int], list[JsonObject]] = {}
    for record in records:
        for window in record["windows"]:
            rows.setdefault(window["row"], []).append(window)
    return sorted(rows.items())
