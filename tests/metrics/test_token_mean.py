"""The standard error of a loss: of rows, not of the blocks that a long row was split into."""

import numpy as np
import pytest

from tunesmith.metrics.token_mean import token_mean


def test_blocks_of_a_document_count_as_one_row():
    draw = np.random.default_rng(0)
    losses, tokens = draw.normal(2, 1, 20), draw.integers(5, 9, 20)
    documents = [
        {
            "rows": [(float(loss * count), int(count)) for loss, count in zip(losses, tokens)],
            "places": [(0, n) for n in range(20)],
        }
    ]
    split = [
        {"rows": [(loss / 4, count / 4) for loss, count in documents[0]["rows"]], "places": documents[0]["places"]}
        for _ in range(4)
    ]
    whole, blocks = token_mean(documents), token_mean(split)
    assert blocks == pytest.approx(whole)
    fooled = token_mean([{"rows": [part for record in split for part in record["rows"]]}])
    assert fooled["eval_loss_stderr"] < 0.6 * whole["eval_loss_stderr"]
