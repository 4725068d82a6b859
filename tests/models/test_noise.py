"""Dropout and NEFTune noise of a row depend on the seed, the step and the row alone."""

import pytest
import torch

import tunesmith
from tests.runs import apart, history, killed_before, recipe, weights
from tests.tiny import tiny_model
from tunesmith.adaptations import lora
from tunesmith.models.heads.noise import RowNoise, install
from tunesmith.models.network import base

ALPHA = 5.0
WIDTH = 32


def row_noise(rows, lengths, packed, seed=1, step=7):
    return RowNoise(seed, step, rows, lengths, packed)


def added_noise(rows, lengths, packed, **changes):
    """What is added to embeddings of zero, one (length, width) for each row, and what is added to padding."""
    shape = (1, sum(lengths)) if packed else (len(rows), max(lengths))
    noise = row_noise(rows, lengths, packed, **changes).add_noise(torch.zeros(*shape, WIDTH), ALPHA)
    if packed:
        return list(noise[0].split(lengths)), torch.zeros(0)
    return [noise[n, :length] for n, length in enumerate(lengths)], torch.cat(
        [noise[n, length:] for n, length in enumerate(lengths)]
    )


def test_the_noise_of_a_row_depends_on_its_length_not_on_its_position():
    together, _ = added_noise([4, 9, 2], [5, 80, 20], True)
    padded, padding = added_noise([4, 9, 2], [5, 80, 20], False)
    other_order, _ = added_noise([2, 4], [20, 5], True)
    (alone,), _ = added_noise([9], [80], False)
    assert all(one.equal(other) for one, other in zip(together, padded))
    assert together[1].equal(alone)
    assert together[2].equal(other_order[0])
    assert not padding.any()


def test_noise_is_uniform_up_to_alpha_over_the_root_of_length_times_width():
    (drawn,), _ = added_noise([0], [400], True)
    bound = ALPHA / (400 * WIDTH) ** 0.5
    assert drawn.abs().max() <= bound
    assert drawn.abs().max() > 0.999 * bound
    assert drawn.mean().abs() < 0.02 * bound
    assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"step": 8}])
def test_another_seed_or_step_draws_other_noise(changes):
    (one,), _ = added_noise([3], [6], True)
    (other,), _ = added_noise([3], [6], True, **changes)
    assert not one.equal(other)


EMBEDDINGS = {
    "plain": None,
    "lora": lora.Config(r=4, target_modules=["q_proj", "embed_tokens"]),
    "trained copy": lora.Config(r=4, modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("wrapped", EMBEDDINGS)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_noise_reaches_the_first_layer_in_training_only(name, wrapped):
    model = tiny_model(name)
    if EMBEDDINGS[wrapped] is not None:
        model = lora.Adaptation(EMBEDDINGS[wrapped]).apply(model, "lm")
    noise, _ = install(model, 0, ALPHA)
    noise.rows, noise.lengths = [0], [6]
    entered = []
    first = base(model).model.layers[0]
    first.register_forward_pre_hook(lambda module, given: entered.append(given[0].detach()))
    ids = torch.arange(6)[None] + 5
    model.eval()(ids)
    model.train()(ids)
    without, with_noise = entered
    expected = RowNoise(0, 0, [0], [6], True).add_noise(torch.zeros(1, 6, WIDTH), ALPHA)
    torch.testing.assert_close(with_noise - without, expected, atol=1e-5, rtol=0)  # gemma's scale is inside its embedding


def test_dropout_drops_nothing_before_rows_are_set_and_refuses_other_tokens():
    x = torch.ones(1, 6, WIDTH)
    assert RowNoise(0).drop(x, 0.5, 0).equal(x)
    with pytest.raises(ValueError, match="expects 5 tokens and got 6"):
        row_noise([3], [5], True).drop(x, 0.5, 0)


def test_nothing_is_drawn_for_a_model_that_drops_nothing():
    assert install(tiny_model("llama"), 0) == (None, [])
    assert install(tiny_model("llama"), 0, ALPHA)[0] is not None


def test_neftune_changes_training_and_leaves_no_trace_in_the_saved_model(tmp_path):
    made = recipe(tmp_path, max_steps=1, count=5)
    plain = tunesmith.train(made, out=tmp_path / "plain")
    made["train"]["neftune_noise_alpha"] = ALPHA
    noisy = tunesmith.train(made, out=tmp_path / "noisy")
    assert apart(weights(plain["model_dir"]), weights(noisy["model_dir"])) > 1e-4  # of the same names: `apart` compares them
    config = [(tmp_path / run / "model" / "config.json").read_text() for run in ("plain", "noisy")]
    assert config[0] == config[1]


def test_a_resumed_run_draws_what_the_undisturbed_one_drew(tmp_path, monkeypatch):
    made = recipe(tmp_path, neftune_noise_alpha=ALPHA, gradient_checkpointing=True, save_steps=1, max_steps=2, count=6)
    straight = tunesmith.train(made, out=tmp_path / "straight")
    killed_before(2, made, tmp_path / "killed")
    resumed = tunesmith.train(made, out=tmp_path / "killed", resume=True)
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    assert apart(weights(straight["model_dir"]), weights(resumed["model_dir"])) == 0
