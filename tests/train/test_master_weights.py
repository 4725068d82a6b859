"""fp32 masters and their bf16 working copies."""

import torch
from torch import nn

from tunesmith.models.load import compute_dtype
from tunesmith.train.master_weights import Masters


def test_working_copies_are_rounded_up_and_down_at_random_anew_in_each_step():
    """A master a quarter of a unit in the last place above 1 is 1 to nearest; at random a quarter of the copies are above."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.ones_(model.weight)
    masters = Masters(model, torch.bfloat16)
    compute_dtype.cast(model, torch.bfloat16)
    masters.masters["weight"].data += 2**-9
    above = []
    for step in (1, 2, 1):
        masters.publish(seed=0, step=step)
        above.append(model.weight > 1)
    assert all(0.2 < float(copies.float().mean()) < 0.3 for copies in above)
    assert above[0].equal(above[2]) and not above[0].equal(above[1])
