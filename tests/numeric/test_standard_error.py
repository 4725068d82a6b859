"""The standard error of an evaluation: right by simulation, and the same however rows are batched."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_model
from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.metrics.token_mean import token_mean
from tunesmith.models.fast import attention
from tunesmith.models.heads import lm_head
from tunesmith.objectives import sft


def test_it_is_the_spread_of_the_mean_over_samples_of_rows():
    """Rows of unequal length, each with a level of its own: what 4,000 evaluations of 100 rows scatter by."""
    draw = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(4000):
        counts = draw.integers(2, 60, 100)
        losses = counts * draw.normal(2.0, 0.5, 100) + np.sqrt(counts) * draw.normal(0, 1.0, 100)
        figures = token_mean([{"rows": list(zip(losses.tolist(), counts.tolist()))}])
        means.append(figures["eval_loss"])
        errors.append(figures["eval_loss_stderr"])
    assert float(np.mean(errors)) == pytest.approx(float(np.std(means)), rel=0.03)


def test_with_rows_of_one_token_it_is_the_textbook_one():
    losses = [1.0, 2.0, 4.0, 9.0]
    figures = token_mean([{"rows": [(loss, 1) for loss in losses]}])
    assert figures["eval_loss"] == 4.0
    assert figures["eval_loss_stderr"] == pytest.approx(np.std(losses, ddof=1) / 2)


def test_one_row_has_no_standard_error_and_none_has_no_mean():
    assert token_mean([{"rows": [(3.0, 2)]}]) == {"eval_loss": 1.5, "perplexity": math.exp(1.5)}
    assert math.isnan(token_mean([])["eval_loss"])


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=2, max_size=12), st.data())
def test_it_does_not_depend_on_the_batches(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    order = data.draw(st.permutations(rows))
    batches = [{"rows": order[start:end]} for start, end in zip([0, *cuts], [*cuts, len(rows)])]
    assert token_mean(batches) == token_mean([{"rows": rows}])


def examples():
    draw = np.random.default_rng(0)
    made = [
        {"input_ids": draw.integers(3, 500, n).astype(np.int32), "supervised": draw.random(n) < 0.5} for n in (9, 4, 23, 2, 17)
    ]
    made[3]["supervised"][:] = False  # nothing to learn
    return made


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("way", ["blocked", "small blocks", "plain"])
def test_losses_of_rows_are_those_of_each_row_alone(packed, way, monkeypatch):
    model = tiny_model("llama")
    if packed:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    if way == "small blocks":
        monkeypatch.setattr(lm_head, "BLOCK", 3)
    lm_head.use_plain_head(model, way == "plain")
    together = sft.Objective(sft.Config()).collate(examples(), PACKED if packed else PADDED)
    found = lm_head.row_losses(model, together)
    alone = [shared_prompts.with_targets([one], PADDED) for one in examples()]
    lm_head.use_plain_head(model, False)
    model.set_attn_implementation("eager")
    wanted = [(float(lm_head.lm_loss(model, one).detach()), len(one["labels"])) for one in alone if len(one["labels"])]
    assert [count for _, count in found] == [count for _, count in wanted]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=1e-5)
