"""Loss and perplexity of any model on any file, by the same data path and the same forward pass as training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.errors import ModelError, RecipeError


def evaluate(
    model: str | Path | tuple[Any, Any],
    data: str | Path,
    *,
    objective: str = "sft",
    format: str | None = None,
    columns: dict[str, str] | None = None,
    prompt_template: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    overlong: str | None = None,
    limit: int | None = None,
    precision: str = "auto",
    batch_tokens: int = 2048,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
) -> dict[str, Any]:
    """Figures of ``model`` (a name, a folder, or a pair (model, tokenizer)) over the rows of ``data``.

    Returns eval_loss (mean per supervised token), eval_loss_stderr (with two rows or more), perplexity, rows, tokens,
    supervised_tokens, tokens_per_second and seconds.
    ``objective`` says what is learnt of a row: ``sft`` = the last answer (text rows whole), ``cpt`` = every token of a document,
    long ones in blocks; ``overlong`` is the policy for rows above
    ``max_length`` (default: the objective's own). ``batch_tokens`` bounds memory and never changes the figures.
    ``split``, ``name`` and ``streaming`` are those of a data set of the Hub (``data`` = "hub:OWNER/NAME"), as in a recipe.
    Raises UserError for a model or data that cannot be used.
    """
    from tunesmith import objectives
    from tunesmith.data.config import DataConfig, EvalConfig, Source, idle
    from tunesmith.data.prepare import prepare
    from tunesmith.engine import distributed, evaluation, route
    from tunesmith.engine import precision as precisions
    from tunesmith.engine.setup import window_of
    from tunesmith.models import load, virtual

    if objective not in objectives.names():
        raise ModelError(f"unknown objective {objective!r}; expected one of {', '.join(objectives.names())}")
    module = objectives.module(objective)
    try:
        chosen = module.Objective(module.Config(**({"overlong": overlong} if overlong else {})))
    except ValidationError as error:
        raise RecipeError(f"overlong: {error.errors()[0]['msg']}, got {overlong!r}") from None
    try:
        source = Source(
            path=str(data), format=format, columns=columns, prompt_template=prompt_template, limit=limit,
            split=split, name=name, streaming=streaming,
        )  # fmt: skip
    except ValidationError as error:
        raise RecipeError(f"data: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if keys := idle(source):
        raise RecipeError(f"{' and '.join(keys)} would do nothing: {data} is no data set of the Hub (hub:OWNER/NAME)")
    device = distributed.state().device
    network, tokenizer = model if isinstance(model, tuple) else load.load(model)
    config = DataConfig(train=[source], eval=EvalConfig(fraction=0.0), template=template)
    rows = prepare(
        config, chosen, tokenizer, max_length=max_length, window=window_of(network.config, virtual.count(network)), seed=0
    ).train

    if not isinstance(model, tuple):  # somebody's own model in memory keeps its dtype and place
        precisions.cast(network, precisions.choose(precision, device).compute)
        network.to(device).eval().requires_grad_(False)
    device = network.device
    order = sorted(range(len(rows)), key=lambda row: rows.lengths[row])
    way = route.choose(network, chosen, [rows[row] for row in order[:2]], int(rows.lengths.max()), "auto", device)
    started = time.perf_counter()
    figures = evaluation.evaluate(network, chosen, rows, way.packed, batch_tokens, device)
    seconds = time.perf_counter() - started
    way.leave(network)
    return {
        **figures,
        "rows": len(rows),
        "tokens": int(rows.lengths.sum()),
        "supervised_tokens": int(rows.supervised.sum()),
        "tokens_per_second": float(rows.lengths.sum()) / seconds,
        "seconds": seconds,
    }
