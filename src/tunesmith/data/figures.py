"""Corpus figures from the sums that evaluation keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def token_mean(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """{"eval_loss", "perplexity"} from records {"loss": sum, "targets": count}; NaN when nothing was counted."""
    targets = sum(record["targets"] for record in records)
    loss = math.fsum(record["loss"] for record in records) / targets if targets else math.nan
    return {"eval_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
