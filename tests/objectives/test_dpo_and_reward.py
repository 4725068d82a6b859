"""Preferences against TRL and against sums by hand, the reference at step 0, and what the numbers must not depend on."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tunesmith
from tests.runs import ANSWERS, apart, history, killed_before, model_folder, preferences, recipe, weights
from tests.shortened import shortened
from tests.tiny import TINY, save_tiny, tiny_model, tiny_tokenizer
from tunesmith import recipe as recipes
from tunesmith.adaptations import lora
from tunesmith.cli import check
from tunesmith.data.batch.pack import PACKED, PADDED, Layout
from tunesmith.data.rows import Ranking
from tunesmith.errors import DataError, ModelError, OutOfMemoryError, RecipeError
from tunesmith.evaluate import open_model
from tunesmith.models.find.locate import locate
from tunesmith.models.heads import lm_head, task_heads
from tunesmith.models.heads.log_probs import answer_logps
from tunesmith.models.load import load
from tunesmith.objectives import dpo, reward
from tunesmith.runs import metrics_file
from tunesmith.train import checkpoint, setup, starting_point
from tunesmith.train.reference import Reference

ROWS = [Ranking(row["prompt"], (row["chosen"], row["rejected"]), (0, 1)) for row in preferences(5)]
MANY = Ranking("question:", tuple(f" {answer}" for answer in ANSWERS[:4]), (0, 1, 1, 2))


def policy(config=None, rows=ROWS, seed=0, **changes):
    """(objective whose reference another network gave, examples, network)."""
    objective = dpo.Objective(dpo.Config(**(config or {})))
    examples = [one for row in objective.encode(rows, tiny_tokenizer(None)) for one in row]
    torch.manual_seed(seed)
    network = tiny_model("llama", **changes)
    if objective.traits.needs_reference:
        torch.manual_seed(seed + 1)
        before = tiny_model("llama", **changes).eval()
        with torch.no_grad():
            found = objective.reference_logps(before, objective.collate(examples, PADDED))
        examples = [{**example, "reference_logps": values.numpy()} for example, values in zip(examples, found, strict=True)]
        objective.before = before
    return objective, examples, network


def gradients(network):
    found = {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
    network.zero_grad()
    return found


def by_hand(network, example, answer):
    """Log-probabilities of the learnt tokens of an answer, one row at a time by the network's own logits."""
    prefix, *lengths = example["answers"].tolist()
    start = prefix + sum(lengths[:answer])
    ids = np.concatenate([example["input_ids"][:prefix], example["input_ids"][start : start + lengths[answer]]])
    learnt = np.concatenate([example["supervised"][:prefix], example["supervised"][start : start + lengths[answer]]])
    logits = network(input_ids=torch.from_numpy(ids).long()[None]).logits[0].double().log_softmax(-1)
    return torch.stack([logits[place - 1, ids[place]] for place in np.flatnonzero(learnt) if place])


def trl_inputs(examples):
    """TRL's batch: all better answers, then all worse ones, padded on the right."""
    rows = []
    for answer in (0, 1):
        for example in examples:
            prefix, *lengths = example["answers"].tolist()
            start = prefix + sum(lengths[:answer])
            own = slice(start, start + lengths[answer])
            rows.append(
                (
                    np.concatenate([example["input_ids"][:prefix], example["input_ids"][own]]),
                    np.concatenate([example["supervised"][:prefix], example["supervised"][own]]),
                )
            )
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for number, (ids, learnt) in enumerate(rows):
        batch["input_ids"][number, : len(ids)] = torch.from_numpy(ids)
        batch["attention_mask"][number, : len(ids)] = 1
        batch["completion_mask"][number, : len(ids)] = torch.from_numpy(learnt)
    return batch


@pytest.mark.parametrize(
    "config",
    [{}, {"loss_type": "ipo"}, {"loss_type": "hinge", "beta": 0.5}, {"loss_type": "robust", "label_smoothing": 0.2}],
    ids=lambda config: config.get("loss_type", "sigmoid"),
)
def test_loss_and_gradients_are_those_of_trl(config, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    objective, examples, network = policy(config)
    network.eval()
    loss, _ = objective.loss(network, objective.collate(examples, PADDED))
    (loss / len(examples)).backward()
    ours = gradients(network)
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    trainer = DPOTrainer(
        model=network, ref_model=objective.before, processing_class=tiny_tokenizer(None), train_dataset=rows,
        args=DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                       **{"loss_type": "sigmoid", "beta": 0.1, **config}),
    )  # fmt: skip
    expected = trainer._compute_loss(trainer.model, trl_inputs(examples), False)
    expected.backward()
    assert float(loss.detach() / len(examples)) == pytest.approx(float(expected.detach()), abs=1e-5)
    theirs = gradients(network)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-5 * max(1.0, float(theirs[name].abs().max()))), name


@pytest.mark.parametrize("loss_type", dpo.LOSSES)
def test_every_loss_is_its_formula(loss_type):
    config = {"loss_type": loss_type, "beta": 0.3, **({"label_smoothing": 0.1} if loss_type in ("sigmoid", "robust") else {})}
    objective, examples, network = policy(config, [*ROWS, MANY])
    network.eval()
    loss, _ = objective.loss(network, objective.collate(examples, PADDED))
    expected = 0.0
    for example in examples:
        pairs = example["pairs"].reshape(-1, 2).tolist()
        for better, worse in pairs:
            won, lost = (by_hand(network, example, one) for one in (better, worse))
            base = [0.0, 0.0]
            if objective.traits.needs_reference:
                base = [float(by_hand(objective.before, example, one).sum()) for one in (better, worse)]
            expected += hand_loss(loss_type, won, lost, *base) / len(pairs)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def hand_loss(kind, won, lost, won_before, lost_before, beta=0.3, flipped=0.1, gamma=0.5):
    won, lost = won.detach().numpy(), lost.detach().numpy()
    lead = (won.sum() - won_before) - (lost.sum() - lost_before)
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    if kind == "sigmoid":
        return -0.9 * log_sigmoid(beta * lead) - 0.1 * log_sigmoid(-beta * lead)
    if kind == "robust":
        return (-(1 - flipped) * log_sigmoid(beta * lead) + flipped * log_sigmoid(-beta * lead)) / (1 - 2 * flipped)
    if kind == "hinge":
        return max(0.0, 1 - beta * lead)
    if kind == "ipo":
        return ((won.sum() - won_before) / len(won) - (lost.sum() - lost_before) / len(lost) - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        return -log_sigmoid(beta * (won.mean() - lost.mean()) - gamma)
    odds = math.log(math.exp(won.mean()) / (1 - math.exp(won.mean()))) - math.log(
        math.exp(lost.mean()) / (1 - math.exp(lost.mean()))
    )
    return -won.mean() - beta * log_sigmoid(odds)


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_that_are_shared_change_nothing(shared):
    from tunesmith.models.fast import attention

    attention.register()
    objective, examples, network = policy(rows=[*ROWS, MANY])
    network.eval()
    objective.loss(network, objective.collate(examples, PADDED))[0].backward()
    expected = gradients(network)
    network.set_attn_implementation(attention.NAME)
    batch = objective.collate(examples, Layout(packed=True, shared=shared))
    assert ("behind" in batch) is shared
    objective.loss(network, batch)[0].backward()
    for name, gradient in gradients(network).items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1.0, float(expected[name].abs().max())), name


# ------------------------------------------------------------------------------------------------------------ reward


def judge(tmp_path, rows=ROWS, **config):
    folder = locate(model_folder(tmp_path, "llama"))
    objective = reward.Objective(reward.Config(**config))
    tokenizer = load.load_tokenizer(folder)
    objective.bind(load.load_config(folder), tokenizer, None)
    torch.manual_seed(0)
    network = load.load_model(folder, head="score", trainable=True, head_config=objective.head_config())
    return objective, [one for row in objective.encode(rows, tokenizer) for one in row], network


@pytest.mark.parametrize("centre", [0.0, 0.05])
def test_reward_loss_and_gradients_are_those_of_trl(tmp_path, centre):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    objective, examples, network = judge(tmp_path, center_rewards_coefficient=centre)
    network.eval()
    loss, _ = objective.loss(network, objective.collate(examples, PADDED))
    (loss / len(examples)).backward()
    ours = gradients(network)
    tokenizer = load.load_tokenizer(locate(model_folder(tmp_path, "llama")))
    objective.bind(network.config, tokenizer, None)  # a pad token that is not its end
    assert tokenizer.pad_token_id == network.config.pad_token_id != tokenizer.eos_token_id
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    trainer = RewardTrainer(
        model=network, processing_class=tokenizer, train_dataset=rows,
        args=RewardConfig(str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                          center_rewards_coefficient=centre or None),
    )  # fmt: skip
    batch = trl_inputs(examples)
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, tokenizer.pad_token_id)
    expected = trainer.compute_loss(trainer.model, {"input_ids": ids, "attention_mask": batch["attention_mask"]})
    expected.backward()
    assert float(loss.detach() / len(examples)) == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, gradient in gradients(network).items():
        assert torch.allclose(ours[name], gradient, atol=1e-5), name


def test_a_reward_depends_on_its_own_tokens_alone(tmp_path):
    from tunesmith.models.fast import attention

    attention.register()
    objective, examples, network = judge(tmp_path, [*ROWS, MANY])
    network.eval()
    rewards = {}
    with torch.no_grad():
        for name, chosen in {"all": examples, "alone": examples[:1], "others": [examples[3], examples[0]]}.items():
            batch = objective.collate(chosen, PADDED)
            found = task_heads.score_logits(network, batch)[:, 0].split(batch["counts"])
            rewards[name] = found[1 if name == "others" else 0]
        network.set_attn_implementation(attention.NAME)
        batch = objective.collate(examples, PACKED)
        rewards["packed"] = task_heads.score_logits(network, batch)[:2, 0]
        network.set_attn_implementation("eager")
        for side in ("left", "right"):
            ids, mask = padded(examples[0], network.config.pad_token_id, side)
            rewards[side] = network(input_ids=ids, attention_mask=mask).logits[:, 0]
    for name, found in rewards.items():
        assert torch.allclose(found, rewards["all"], atol=1e-6), name


def padded(example, pad, side, more=7):
    prefix, *lengths = example["answers"].tolist()
    ids = torch.full((2, prefix + max(lengths) + more), pad)
    mask = torch.zeros_like(ids)
    for number, length in enumerate(lengths):
        start = prefix + sum(lengths[:number])
        row = np.concatenate([example["input_ids"][:prefix], example["input_ids"][start : start + length]])
        where = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[number, where], mask[number, where] = torch.from_numpy(row).long(), 1
    return ids, mask


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_rewards_of_a_bf16_network_are_not_rounded_to_bf16(tmp_path, adaptation, plain):
    rows = [Ranking(f"question {n}:", (f" {ANSWERS[n % 8]} {n}", f" {n} no"), (0, 1)) for n in range(24)]
    objective, examples, network = judge(tmp_path, rows)
    if adaptation == "lora":
        network = lora.Adaptation(lora.Config(r=4)).apply(network, "score")
    lm_head.use_plain_head(network, plain)
    batch = objective.collate(examples, PADDED)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        network.to(dtype).eval()
        loss, _ = objective.loss(network, batch)
        loss.backward()
        found[dtype] = task_heads.score_logits(network, batch)[:, 0].detach(), gradients(network)
    (exact, expected), (rewards, reached) = found.values()
    assert rewards.dtype == torch.float32 and len(rewards.unique()) == len(exact.unique()) == 48
    assert (rewards.bfloat16().float() != rewards).float().mean() > 0.9
    assert reached.keys() == expected.keys()  # of the body and of the output layer
    for name, gradient in expected.items():
        assert reached[name].dtype == torch.bfloat16
        assert (reached[name].float() - gradient).norm() <= 0.15 * gradient.norm() + 1e-6, name


def test_margins_are_differences_of_scores(tmp_path):
    rows = [Ranking("a", (" b", " c", " d"), (0, 1, 2), (3.0, 1.0, 0.5))]
    objective, examples, network = judge(tmp_path, rows, margin=True)
    batch = objective.collate(examples, PADDED)
    assert batch["margins"].tolist() == [2.0, 2.5, 0.5] and batch["weights"].tolist() == pytest.approx([1 / 3] * 3)
    values = task_heads.score_logits(network.eval(), batch)[:, 0].detach()
    lead = torch.stack([values[0] - values[1] - 2, values[0] - values[2] - 2.5, values[1] - values[2] - 0.5])
    assert float(objective.loss(network, batch)[0]) == pytest.approx(
        float(-torch.nn.functional.logsigmoid(lead).mean()), rel=1e-5
    )


def test_accuracy_is_reported_by_length_difference(tmp_path):
    objective, _, _ = judge(tmp_path)
    pairs = [
        {"loss": 1.0, "lead": lead, "weight": 1.0, "longer": longer} for lead, longer in ((1, 5), (2, 9), (-1, -3), (-2, -8))
    ]
    rows = [{"row": (0, number), "rewards": [0.0, 1.0], "pairs": [pair]} for number, pair in enumerate(pairs)]
    found = objective.details([{"rows": rows}])
    assert found["accuracy"] == 0.5 and found["longer_is_better"] == 0.5
    by_length = [one["accuracy"] for one in found["by_length"].values()]
    assert by_length[0] == 0.0 and by_length[-1] == 1.0


# --------------------------------------------------------------------------------------------------------- whole runs

STARTS = {
    "full": "full",
    "lora": {"type": "lora", "r": 4},
    "pissa": {"type": "lora", "r": 4, "init_lora_weights": "pissa"},
    "qlora": {"type": "qlora", "r": 4},
    "prefix": {"type": "prefix", "num_virtual_tokens": 3},
    "bottleneck": {"type": "bottleneck", "bottleneck_size": 4},
}


def first(run):
    return next(record for record in metrics_file.read(run / "metrics.jsonl") if record["kind"] == "train")


@pytest.mark.parametrize("start", [*STARTS, "continued"])
def test_at_step_0_the_policy_is_its_own_reference(tmp_path, start):
    if start == "qlora":
        pytest.importorskip("bitsandbytes")
    made = recipe(
        tmp_path, "llama", "dpo", STARTS.get(start, STARTS["lora"]), max_steps=3, save_steps=1, save_total_limit=9, eval_steps=1
    )
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    made["samples"] = {"count": 1, "max_new_tokens": 3}
    if start == "continued":
        before = tunesmith.train(made, out=tmp_path / "before")["model_dir"]
        made = {**made, "model": before, "adapter": "continue"}
    tunesmith.train(made, out=tmp_path / "run")
    records = metrics_file.read(tmp_path / "run" / "metrics.jsonl")
    for record, prefix in ((first(tmp_path / "run"), ""), (next(one for one in records if one["kind"] == "eval"), "eval_")):
        assert record[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert record[f"{prefix}rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert records[-1]["eval_loss"] < math.log(2)
    checkpoints = tmp_path / "run" / "checkpoints"
    kept = [checkpoint.load_file(checkpoints / f"step-{step}" / "state.safetensors") for step in (1, 3)]
    names = [name for name in kept[0] if name.startswith("reference.")]
    assert len(names) == 3 and all(torch.equal(kept[0][name], kept[1][name]) for name in names)


def dropping(**changes):
    """The shape of a network that drops by a function: opt by rates that its layers keep, falcon by those of its config."""
    return dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
                bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes)  # fmt: skip


def test_functional_dropout_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setitem(TINY, "opt", dropping(word_embed_proj_dim=32, ffn_dim=64))
    tunesmith.train(recipe(tmp_path, "opt", "dpo", max_steps=1), out=tmp_path / "run")
    assert first(tmp_path / "run")["loss"] == pytest.approx(math.log(2), abs=1e-6)
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert any("dropout (0.1) is off" in note for note in notes)
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["dropout"] == 0.1  # it is the model's own, for whoever trains it on


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_a_network_with_something_random_in_it_is_refused(tmp_path, objective, monkeypatch):
    monkeypatch.setitem(TINY, "falcon", dropping(hidden_dropout=0.1))
    with pytest.raises(ModelError, match="computes another result in training mode than in eval mode"):
        tunesmith.train(recipe(tmp_path, "falcon", objective), out=tmp_path / "run")


SPLIT = [("gpt2", "dpo"), ("qwen3", "reward"), ("gemma", "dpo")]


@pytest.mark.parametrize(("name", "objective"), shortened(SPLIT, SPLIT[:2]))
def test_any_split_makes_the_same_update(tmp_path, name, objective):
    made = recipe(tmp_path, name, objective, {"type": "lora", "r": 4}, learning_rate=1e-3, optim_args={"eps": 1e-3})
    whole = tunesmith.train(made, out=tmp_path / "whole")
    route = json.loads((tmp_path / "whole" / "manifest.json").read_text())["route"]
    assert route["shared"] and route["batches"] == "packed"
    for number, split in enumerate(({"micro_batch_tokens": 60}, {"packing": "off"})):
        other = tunesmith.train({**made, "train": {**made["train"], **split}}, out=tmp_path / str(number))
        assert apart(weights(whole["model_dir"]), weights(other["model_dir"])) <= 1e-6, split


def test_logged_figures_are_means_over_all_rows_since_the_last_record(tmp_path):
    made = recipe(tmp_path, "llama", "dpo", max_steps=3, logging_steps=1, save_steps=1)  # steps of 5, 5 and 2 rows
    tunesmith.train(made, out=tmp_path / "each")
    each = [
        (record, rows) for record, rows in zip(metrics_file.read(tmp_path / "each" / "metrics.jsonl"), (5, 5, 2), strict=True)
    ]
    made["train"]["logging_steps"] = 3
    tunesmith.train(made, out=tmp_path / "together")
    killed_before(3, made, tmp_path / "killed")
    tunesmith.train(made, out=tmp_path / "killed", resume=True)
    (together,) = history(tmp_path / "together")
    for name in [name for name in each[0][0] if name.startswith(("rewards/", "logps/", "kl"))]:
        assert together[name] == pytest.approx(sum(record[name] * rows for record, rows in each) / 12, rel=1e-12), name
    assert history(tmp_path / "killed") == [together]


def test_a_checkpoint_without_its_reference_is_refused(tmp_path, monkeypatch):
    made = recipe(tmp_path, "llama", "dpo", max_steps=4, save_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Reference, "tensors", lambda self: {})
        killed_before(3, made, tmp_path / "run")
    with pytest.raises(RecipeError, match="lacks the reference"):
        tunesmith.train(made, out=tmp_path / "run", resume=True)


def test_rows_with_other_tokens_are_no_resume(tmp_path, monkeypatch):
    """As a library of another version makes them: the files of the model are the same."""
    made = recipe(tmp_path, "llama", "dpo", max_steps=4, save_steps=2)
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
        for row in preferences(8)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    killed_before(3, made, tmp_path / "run")
    template = tmp_path / "model-llama" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>'", "<|im_start|> '"))
    monkeypatch.setattr(starting_point, "_differences", lambda before, now: [])
    with pytest.raises(RecipeError, match=r"rows\.jsonl:\d has other tokens than when the run was started"):
        tunesmith.train(made, out=tmp_path / "run", resume=True)


def test_eight_preferences_are_memorised(tmp_path):
    made = recipe(tmp_path, "llama", "dpo", count=8, max_steps=60, batch_size=8, learning_rate=1e-2)
    tunesmith.train(made, out=tmp_path / "run")
    last = metrics_file.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["rewards/accuracies"] == 1.0 and last["loss"] < 0.1


def test_eight_judgements_are_memorised_and_scored(tmp_path):
    made = recipe(tmp_path, "llama", "reward", count=8, max_steps=60, batch_size=8, learning_rate=1e-2)
    found = tunesmith.train(made, out=tmp_path / "run")
    said = list(tunesmith.predict(found["model_dir"], tmp_path / "rows.jsonl", rewards=True))
    assert [one["ranking"] for one in said] == [[0, 1]] * 8
    single = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences(8)]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    alone = list(tunesmith.predict(found["model_dir"], tmp_path / "single.jsonl", rewards=True))
    assert [one["reward"] for one in alone] == pytest.approx([one["rewards"][0] for one in said], abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(found["model_dir"])
    assert plain.config.num_labels == 1


def test_an_evaluation_has_the_loss_of_the_training(tmp_path):
    made = recipe(tmp_path, "llama", {"type": "reward", "center_rewards_coefficient": 0.5}, max_steps=3, eval_steps=3)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    found = tunesmith.train(made, out=tmp_path / "run")
    again = tunesmith.evaluate(found["model_dir"], tmp_path / "rows.jsonl", precision="fp32")
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)


def test_ties_are_half_right_and_calibrated(tmp_path):
    objective, _, _ = judge(tmp_path)
    pairs = [{"loss": 1.0, "lead": 0.0, "weight": 1.0, "longer": 0}] * 4
    rows = [{"row": (0, number), "rewards": [0.0, 0.0], "pairs": [pair]} for number, pair in enumerate(pairs)]
    found = objective.details([{"rows": rows}])
    assert found["accuracy"] == 0.5 and found["calibration_error"] == pytest.approx(0.0)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_figures_without_a_reference_are_by_token_like_their_loss(loss_type):
    rows = [Ranking("a", (" b b b b b b", " c"), (0, 1))]
    objective, examples, network = policy({"loss_type": loss_type}, rows)
    batch = objective.collate(examples, PADDED)
    tokens = batch["tokens"].double()
    found = objective.loss(network.eval(), batch)[1]
    expected = 0.1 * answer_logps(network, batch).detach() / tokens
    for name, place in (("rewards/chosen", 0), ("rewards/rejected", 1)):
        assert float(found[name][0]) == pytest.approx(float(expected[place]), rel=1e-6)


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    """(model folder, its training rows) of a reward model."""
    root = tmp_path_factory.mktemp("reward")
    outcome = tunesmith.train(recipe(root, "llama", "reward", max_steps=2), out=root / "run")
    return outcome["model_dir"], root / "rows.jsonl"


def test_a_report_of_rewards_is_of_lengths_and_shows_what_was_preferred(reward_run, tmp_path):
    model, rows = reward_run
    figures = tunesmith.evaluate(model, rows, out=tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert (tmp_path / "report" / "by-length.png").exists() and (tmp_path / "report" / "calibration.png").exists()
    longer = figures["details"]["longer_is_better"]
    assert f"by always taking the {'longer' if longer >= 0.5 else 'shorter'} one" in html
    worst = json.loads((tmp_path / "report" / "mistakes.jsonl").read_text("utf-8").splitlines()[0])
    row = json.loads(rows.read_text("utf-8").splitlines()[worst["row"][1] - 1])
    assert worst["text"] == row["prompt"] and worst["gold"].endswith(row["chosen"])
    assert worst["prediction"].endswith(row["rejected"]) == (worst["rewards"][1] > worst["rewards"][0])


def test_the_time_of_the_reference_is_forecast_and_recorded(tmp_path):
    made = recipe(tmp_path, "llama", "dpo", max_steps=4, save_steps=2)
    assert tunesmith.check(made, measure=True)["forecast"]["reference_seconds"] > 0
    killed_before(3, made, tmp_path / "run")
    assert tunesmith.train(made, out=tmp_path / "run", resume=True)["reference_seconds"] > 0


def test_rows_above_max_length_are_counted_by_what_was_done(tmp_path):
    """Ten rows: seven fit, of one the prompt is cut, of two an answer alone is too long."""
    made = recipe(tmp_path, "llama", "dpo", max_length=40)
    rows = [{"prompt": f"{n}: a b", "chosen": f" good {n}", "rejected": " bad"} for n in range(7)]
    rows += [{"prompt": "what is the " * 20, "chosen": " yes", "rejected": " no"}]
    rows += [{"prompt": f"{n}: a b", "chosen": " long" * 60, "rejected": " bad"} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tunesmith.check(made)
    overlong = found["data"]["train"]["overlong"]
    assert found["max_length"] == found["data"]["max_length"] == 40
    assert (overlong["policy"], overlong["rows"], overlong["dropped"]) == ("truncate", 3, 2) and overlong["tokens_lost"] > 20
    said = next(line for line in check.lines(found) if "over max_length" in line)
    assert "3 rows are over max_length (truncate): 2 left out whole, the prompts of 1 cut from the left (" in said
    made["train"]["max_length"] = 4
    with pytest.raises(DataError, match=r"no training rows are left: all 10 .* max_length 4\. Raise train.max_length"):
        tunesmith.check(made)


def test_scoring_reports_cut_prompts(reward_run, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "what is the " * 20, "chosen": " yes", "rejected": " no"}))
    said: list[str] = []
    list(tunesmith.predict(reward_run[0], tmp_path / "long.jsonl", rewards=True, max_length=40, note=said.append))
    assert said == ["1 rows were longer than 40 tokens; their prompts were cut from the left"]


def four_answers(tmp_path, objective, adaptation="full", **train):
    """A run on rows of four answers to prompts of some 60 tokens, with held-out ones."""
    made = recipe(tmp_path, "llama", objective, adaptation, max_steps=2, eval_steps=1, **train)
    rows = [{"prompt": f"{n}: " + "what is the " * 15, "answers": [f" {a} {n}" for a in ANSWERS[:4]]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    return made


def seen(monkeypatch, kind):
    """Of every batch since the route was found: how many examples it has, how many tokens."""
    sizes, collate = [], kind.collate
    for where, name in ((setup, "build"), (open_model.OpenedModel, "prepare")):
        found = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, found=found: (found(*args), sizes.clear())[0])

    def watched(self, examples, layout):
        batch = collate(self, examples, layout)
        sizes.append((len(examples), batch["input_ids"].numel()))
        return batch

    monkeypatch.setattr(kind, "collate", watched)
    return sizes


@pytest.mark.parametrize(("adaptation", "packing"), [("full", "auto"), ("full", "off"), ("prefix", "auto")])
def test_a_prompt_counts_as_often_as_the_network_sees_it(tmp_path, adaptation, packing, monkeypatch):
    made = four_answers(tmp_path, "dpo", adaptation, packing=packing, micro_batch_tokens=700)
    sizes = seen(monkeypatch, dpo.Objective)
    result = tunesmith.train(made, out=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert facts["route"]["shared"] == ((adaptation, packing) == ("full", "auto"))
    assert all(tokens <= 700 for _, tokens in sizes)
    assert max(tokens for _, tokens in sizes) > 350  # and the budget is made use of
    lengths = tunesmith.check(made)["data"]["train"]
    assert result["tokens"] == pytest.approx(lengths["tokens"] * 10 / 12, rel=0.05)  # figures count a prompt once


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_a_sliding_window_must_cover_an_answer_with_its_prompt_and_not_all_answers(tmp_path, objective):
    made = four_answers(tmp_path, objective)
    data = setup.read(recipes.parse(made), torch.device("cpu"), lambda line: None).data.train
    assert data.longest < data.lengths.max()
    for window, batches in ((data.longest, "packed"), (data.longest - 1, "padded")):
        made["model"] = str(save_tiny("mistral", tmp_path / f"window-{window}", sliding_window=window))
        tunesmith.train(made, out=tmp_path / str(window))
        manifest = json.loads((tmp_path / str(window) / "manifest.json").read_text())
        assert manifest["route"]["batches"] == batches


def test_scoring_counts_the_prompt_of_each_padded_answer(tmp_path, monkeypatch):
    found = tunesmith.train(four_answers(tmp_path, "reward", "prefix", packing="off"), out=tmp_path / "run")
    sizes = seen(monkeypatch, reward.Objective)
    list(tunesmith.predict(found["model_dir"], tmp_path / "rows.jsonl", rewards=True, batch_tokens=700))
    assert sum(count for count, _ in sizes) == 12 and all(tokens <= 700 for _, tokens in sizes)


def test_a_reference_that_does_not_fit_is_taken_in_halves(tmp_path, monkeypatch):
    made, measure = four_answers(tmp_path, "dpo", micro_batch_tokens=2000), dpo.Objective.reference_logps
    tunesmith.train(made, out=tmp_path / "whole")
    tried = []

    def small(self, model, batch):
        tried.append(batch["input_ids"].numel())
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return measure(self, model, batch)

    monkeypatch.setattr(dpo.Objective, "reference_logps", small)
    most = 500
    tunesmith.train(made, out=tmp_path / "halved")
    assert sum(size > most for size in tried) < sum(size <= most for size in tried)
    for ours, theirs in zip(history(tmp_path / "halved"), history(tmp_path / "whole"), strict=True):
        name = "eval_loss" if ours["kind"] == "eval" else "loss"
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    most = 10
    with pytest.raises(OutOfMemoryError, match=r"log-probabilities of .*rows\.jsonl:\d+: this row alone \(\d+ tokens\)"):
        tunesmith.train(made, out=tmp_path / "none")


def test_scores_go_to_stdout_without_a_file(reward_run, capsys):
    from tunesmith.cli.main import main

    model, rows = reward_run
    ask = ["score", model, "--data", str(rows), "--limit", "3"]
    assert main(ask) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["row"] for one in said] == [1, 2, 3] and all(len(one["rewards"]) == 2 for one in said)
    assert main([*ask, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == said


def test_a_reward_model_of_another_trainer_is_scored(tmp_path):
    """One label, and nothing that says what for. Judgements of the rows are not looked at."""
    network = AutoModelForSequenceClassification.from_pretrained(model_folder(tmp_path, "llama"), num_labels=1).eval()
    tokenizer = load.load_tokenizer(locate(model_folder(tmp_path, "llama")))
    network.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a b", "answers": [" c", " d e", " c"], "scores": [1, 1, None]}))
    (said,) = tunesmith.predict(tmp_path / "theirs", tmp_path / "rows.jsonl", rewards=True, precision="fp32")
    ids = tokenizer("a b d e", return_tensors="pt")["input_ids"]
    ended = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
    with torch.no_grad():
        assert said["rewards"][1] == pytest.approx(float(network(input_ids=ended).logits), abs=1e-5)
    assert said["rewards"][0] == pytest.approx(said["rewards"][2], abs=1e-6)


@pytest.mark.parametrize("objective", ["sft", "classify"])
def test_a_model_without_a_reward_head_cannot_score(tmp_path, objective):
    found = tunesmith.train(recipe(tmp_path, "llama", objective, max_steps=1), out=tmp_path / "run")
    with pytest.raises(ModelError, match="reward"):
        list(tunesmith.predict(found["model_dir"], tmp_path / "rows.jsonl", rewards=True))


def test_a_reward_model_writes_nothing(reward_run):
    with pytest.raises(ModelError):
        tunesmith.generate(reward_run[0], ["a"])


def test_margins_without_scores_are_refused():
    with pytest.raises(DataError, match="no row has any"):
        reward.Objective(reward.Config(margin=True)).scan(ROWS)
