"""What the policy says of every answer before its first step: the reference that preferences are measured against.

It is computed once, of the rows that the run will see, by the same data path and the same forward pass as training, and is part
of every checkpoint. So it is the policy at step 0 whatever the adaptation is: adapters that are switched off are something else
where they began as something else (a continued adapter, PiSSA, a random prefix), and a second model would cost its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch import preference_batch
from tunesmith.data.batch.pack import to_device
from tunesmith.data.store.encoded import Encoded
from tunesmith.errors import RecipeError
from tunesmith.runs import figures
from tunesmith.train import distributed, fitting, setup


def take(ready: setup.Setup, built: setup.Built, budget: int, say: Callable[[str], None]) -> float:
    """Fill the objective's reference with what ``built.model`` says now, unless a checkpoint has filled it already.

    ``budget``: tokens of a micro-batch. Returns the seconds it took, 0 where there was nothing to do.
    """
    objective: Any = ready.objective
    if objective.reference is None or objective.reference.taken:
        return 0.0
    started = time.perf_counter()
    built.model.eval()
    rows = tokens = 0
    for data, chosen in rows_of_run(ready):
        rows, tokens = rows + len(chosen), tokens + int(data.lengths[chosen].sum())
        for found in distributed.gather(_measured(built, objective, data, chosen, budget, ready.device)):
            objective.reference.add(found)
    objective.reference.taken = True
    say(f"the reference is the policy before its first step: {rows:,} rows, {figures.count(tokens)} tokens, computed once")
    return time.perf_counter() - started


def require(objective: Any, tensors: Mapping[str, Any]) -> None:
    """Take the reference from a checkpoint. Raises RecipeError when it has none: the weights of step 0 are gone by then."""
    if objective.reference is not None and not objective.reference.load(tensors):
        raise RecipeError(
            "the checkpoint lacks the reference that this objective compares with, and the weights have moved since.\n"
            "  Start another run with --out DIR."
        )


def check_known(ready: setup.Setup) -> None:
    """Raise RecipeError where a row of the run is not among those that the checkpoint's reference was taken of."""
    objective: Any = ready.objective
    if objective.reference is None:
        return
    for data, chosen in rows_of_run(ready):
        for number in chosen:
            if preference_batch.key_of(data[int(number)]) not in objective.reference:
                raise RecipeError(
                    f"{data.where(int(number))} has other tokens than when the run was started, so the reference that the "
                    "checkpoint holds is not its own: the tokenizer, its chat template or the model's window changed.\n"
                    f"  Put the files of {ready.model_folder.path} back as they were, or start another run with --out DIR."
                )


def rows_of_run(ready: setup.Setup) -> Iterable[tuple[Encoded, np.ndarray]]:
    """The rows that the steps of the run take, and those that are held out; each once."""
    yield ready.data.train, ready.plan.seen()
    if ready.data.eval is not None:
        yield ready.data.eval, np.arange(len(ready.data.eval))


def _measured(
    built: setup.Built, objective: Any, data: Encoded, rows: np.ndarray, budget: int, device: torch.device
) -> list[dict[int, list[float]]]:
    """{key of a row: log-probabilities of its answers} of this process's share of ``rows``."""
    order = rows[np.argsort(-data.lengths[rows], kind="stable")]
    state = distributed.state()
    mine = order[state.process_index :: state.num_processes]
    packed = built.route.packed

    @torch.no_grad()
    def run(places: list[int]) -> dict[int, list[float]]:
        batch = objective.collate([data[int(row)] for row in mine[places]], packed)
        found: dict[int, list[float]] = objective.measure(built.model, to_device(batch, device))
        return found

    def name(place: int) -> str:
        return f"the reference of {data.where(int(mine[place]))}"

    return fitting.in_groups(run, data.sizes(mine, packed, objective.shared), budget, packed, device, name)
