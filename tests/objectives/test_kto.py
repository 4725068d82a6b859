"""KTO against TRL and against sums by hand; its baseline is of the whole step, and of prompts with responses to other prompts."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tunesmith
from tests.runs import ANSWERS, judged, recipe
from tests.tiny import tiny_model, tiny_tokenizer
from tunesmith.data.batch import other_response
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.step import Step
from tunesmith.data.data_config import DataConfig, EvalConfig, Source
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import DataError
from tunesmith.models.fast import attention
from tunesmith.objectives import kto
from tunesmith.runs import metrics_file
from tunesmith.train import reference as references
from tunesmith.train.session import RunSession

ALONE = [
    {"prompt": f"question {n}:" + " what is the" * (n % 3), "completion": f" {ANSWERS[n % 8]} {n}", "label": n % 3 != 0}
    for n in range(7)
]
"""Every row has a prompt of its own, so a row's partner is the row before it, as in TRL."""


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(folder, rows=ALONE, max_length=None, adds_bos=False, evaluation=None, **config):
    """(objective, its data) of rows."""
    objective, tokenizer = kto.Objective(kto.Config(**config)), tiny_tokenizer(adds_bos=adds_bos)
    objective.bind(None, tokenizer, max_length)
    sources = [Source(path=written(folder, rows))]
    data = DataConfig(train=sources, eval=evaluation or EvalConfig(fraction=0), cache=False)
    return objective, prepare(data, objective, tokenizer, max_length=max_length, window=None, seed=0)


class Run:
    """A policy and another random network as its reference, with the run's own step and session."""

    def __init__(self, folder, rows=ALONE, *, swapped=False, budget=4096, layout=PADDED, **config):
        self.objective, found = prepared(folder, rows, **config)
        self.before, self.policy = (tiny_model("llama", seed=seed) for seed in ((1, 0) if swapped else (0, 1)))
        for network in (self.before, self.policy):
            if layout is PACKED:
                attention.register()
                network.set_attn_implementation(attention.NAME)
        self.layout, known = layout, references.Reference()
        self.examples = [found.train[index] for index in range(len(found.train))]
        data = found.train.attach(known.attach)
        self.step = Step(1, data, np.arange(len(data)), self.objective.collate)
        self.session = RunSession(None, torch.device("cpu"), 0, None, self.before, SimpleNamespace(layout=layout), budget)
        references.compute(known, self.objective, self.session, [self.step], lambda line: None)
        self.session.model = self.policy

    def baseline(self):
        return self.source().baseline(self.step)

    def source(self):
        return kto.BaselineSource(SimpleNamespace(steps=lambda start: iter([self.step])), self.session, self.objective)

    def loss(self, parts=1):
        """(mean loss of the step in so many micro-batches, metrics as means); gradients are left in the policy."""
        step = next(iter(self.source().steps(1))) if self.objective.estimates_kl else self.step
        total, sums = torch.zeros((), dtype=torch.float64), defaultdict(lambda: [0.0, 0.0])
        for places in np.array_split(np.arange(len(step)), parts):
            loss, metrics = self.objective.loss(self.policy, step.micro(places.tolist(), self.layout).batch)
            (loss / len(step)).backward()
            total += loss.detach()
            for name, (value, count) in metrics.items():
                sums[name] = [sums[name][0] + float(value), sums[name][1] + float(count)]
        return float(total / len(step)), {name: value / count for name, (value, count) in sums.items() if count}


def gradients(network):
    found = {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
    network.zero_grad()
    return found


def plain_logps(network, rows):
    """log p of the tokens from P on of each (ids, P): a padded forward of transformers, nothing of tunesmith."""
    longest = max(len(ids) for ids, _ in rows)
    batch, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for number, (ids, _) in enumerate(rows):
        batch[number, : len(ids)], mask[number, : len(ids)] = torch.tensor(ids), 1
    logits = network(input_ids=batch, attention_mask=mask).logits.double().log_softmax(-1)
    return torch.stack([
        sum(logits[number, place - 1, ids[place]] for place in range(start, len(ids))) for number, (ids, start) in enumerate(rows)
    ])  # fmt: skip


def tokenised(rows):
    """(prompt, response) token ids, by the tokenizer alone."""
    tokenizer = tiny_tokenizer()
    return [
        (tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id])
        for row in rows
    ]


def both_kinds(rows, partners):
    """Each row's (ids, P), and its prompt with its partner's response."""
    parts = tokenised(rows)
    own = [([*prompt, *response], len(prompt)) for prompt, response in parts]
    return own, [([*prompt, *parts[other][1]], len(prompt)) for (prompt, _), other in zip(parts, partners, strict=True)]


def before_it(rows):
    """By brute force: the nearest row before each, cyclically, with another prompt."""
    count = len(rows)
    return [
        next(
            (place - back) % count for back in range(1, count) if rows[(place - back) % count]["prompt"] != rows[place]["prompt"]
        )
        for place in range(count)
    ]


def trl_loss(policy, reference, policy_kl, reference_kl, label, *, beta, desirable_weight, undesirable_weight, loss_type):
    """TRL's own loss, from summed log-probabilities (n,): (loss, metrics)."""
    from trl.trainer.kto_trainer import KTOTrainer

    count, zeros = len(policy), torch.zeros(len(policy), 1)
    both = (policy, policy_kl)

    def model(**given):
        logps = both[int(given["input_ids"][0, 0])]
        return SimpleNamespace(log_probs=logps.unsqueeze(1), entropy=zeros, mean_logits=zeros)

    ids, ones = torch.zeros(count, 2, dtype=torch.long), torch.ones(count, 2, dtype=torch.long)
    batch = {
        "input_ids": ids, "attention_mask": ones, "completion_mask": ones, "KL_input_ids": ids + 1, "KL_attention_mask": ones,
        "KL_completion_mask": ones, "label": label, "ref_logps": reference, "ref_KL_logps": reference_kl,
    }  # fmt: skip
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        calculate_KL=loss_type == "kto", aux_loss_enabled=False, precompute_ref_logps=True, beta=beta, loss_type=loss_type,
        desirable_weight=desirable_weight, undesirable_weight=undesirable_weight, _tp_size=1,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    loss = KTOTrainer._compute_loss(trainer, model, batch, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def assert_as_trl(run, rows=ALONE, parts=1):
    """Loss, gradient and metrics of ``run`` are TRL's, from forwards of plain transformers."""
    loss, metrics = run.loss(parts)
    ours = gradients(run.policy)
    for network in (run.policy, run.before):
        network.set_attn_implementation("eager")
    config, (own, others) = run.objective.config, both_kinds(rows, [(place - 1) % len(rows) for place in range(len(rows))])
    with torch.no_grad():
        reference, reference_kl = plain_logps(run.before, own), plain_logps(run.before, others)
    policy, policy_kl = plain_logps(run.policy, own), plain_logps(run.policy, others)
    expected, theirs = trl_loss(
        policy, reference, policy_kl, reference_kl, torch.tensor([row["label"] for row in rows]), beta=config.beta,
        desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight, loss_type=config.loss_type,
    )  # fmt: skip
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = gradients(run.policy)
    assert ours.keys() == wanted.keys()
    for name, gradient in ours.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name
    for name, value in metrics.items():
        assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    return theirs


WEIGHTS = {"undesirable_weight": 0.7}
KINDS = {
    "kl above 0": {"beta": 0.02},
    "kl below 0": {"beta": 0.02, "swapped": True},
    "apo": {"beta": 0.02, "loss_type": "apo_zero_unpaired"},
}
"""beta is small, because two random networks are far apart, and the gradient of a saturated sigmoid shows nothing."""


@pytest.mark.parametrize(("parts", "layout"), [(1, PADDED), (3, PACKED)], ids=["padded", "packed parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_metrics_are_those_of_trl(tmp_path, kind, parts, layout):
    run = Run(tmp_path, layout=layout, budget=60, **KINDS[kind], **WEIGHTS)
    theirs = assert_as_trl(run, parts=parts)
    if kind != "apo":
        assert (theirs["kl"] > 0.5) is (kind == "kl above 0"), "both sides of the clamp are tested"


def baseline_of_two_rows(source, step):
    """The baseline of the first rows alone, as of a micro-batch."""
    terms = source.session.forward(source.objective.kl_terms, step)
    return torch.stack([terms[place] for place in range(2)]).mean().clamp(min=0)


def without_clamp(source, step):
    return torch.stack(list(source.session.forward(source.objective.kl_terms, step).values())).mean()


def with_gradient(objective, log_ratio, kl, good, losses=kto.Objective._losses):
    return losses(objective, log_ratio, log_ratio.mean() - log_ratio.mean().detach() + kl, good)


def swapped(objective, log_ratio, kl, good, losses=kto.Objective._losses):
    return losses(objective, log_ratio, kl, ~good)


def sign(objective, log_ratio, kl, good, losses=kto.Objective._losses):
    return losses(objective, -log_ratio, -kl, good)


FAULTS = {
    "kl of a part": ("kl above 0", kto.BaselineSource, "baseline", baseline_of_two_rows),
    "no clamp": ("kl below 0", kto.BaselineSource, "baseline", without_clamp),
    "kl with gradient": ("kl above 0", kto.Objective, "_losses", with_gradient),
    "labels swapped": ("apo", kto.Objective, "_losses", swapped),
    "sign": ("apo", kto.Objective, "_losses", sign),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_not_trl(tmp_path, fault, monkeypatch):
    kind, owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        assert_as_trl(Run(tmp_path, **KINDS[kind], **WEIGHTS))


def test_swapped_weights_are_not_trl(tmp_path):
    run = Run(tmp_path, **KINDS["kl above 0"], **WEIGHTS)
    losses = kto.Objective(run.objective.config.model_copy(update={"desirable_weight": 0.7, "undesirable_weight": 1.0}))._losses
    run.objective._losses = losses
    with pytest.raises(AssertionError):
        assert_as_trl(run)


# ---------------------------------------------------------------------------------------------------------- baseline


def by_hand(run, rows):
    """max(0, mean of log (policy / reference) of all mismatched pairs), one row at a time."""
    _, others = both_kinds(rows, before_it(rows))
    with torch.no_grad():
        terms = [float(plain_logps(run.policy, [one]) - plain_logps(run.before, [one])) for one in others]
    return terms, max(0.0, math.fsum(terms) / len(terms))


@pytest.mark.parametrize(("rows", "swapped"), [(ALONE, False), (judged(9), True)], ids=["own prompts", "shared prompts"])
def test_the_baseline_is_of_all_rows_of_the_step_whatever_the_micro_batches(tmp_path, rows, swapped):
    run = Run(tmp_path, rows, swapped=swapped)
    terms, expected = by_hand(run, rows)
    assert expected > 0.5 and np.std(terms) > 0.1
    for layout in (PADDED, PACKED):
        for network in (run.policy, run.before):
            network.set_attn_implementation(attention.NAME if layout is PACKED else "eager")
        run.session.fast_path = SimpleNamespace(layout=layout)
        for budget in (1, 60, 130, 4096):
            run.session.budget = budget
            assert float(run.baseline()) == pytest.approx(expected, rel=1e-5), (layout, budget)
    assert not run.baseline().requires_grad


def test_every_micro_batch_of_a_step_has_the_same_baseline(tmp_path):
    run = Run(tmp_path, judged(9))
    (step,) = run.source().steps(1)
    micro = [step.micro(places, PADDED).batch for places in step.split(60, PADDED)]
    assert len(micro) > 2 and len({float(batch["kl"]) for batch in micro}) == 1
    assert all("other" not in batch for batch in micro), "the mismatched pairs are not collated twice"


def test_processes_add_their_terms(tmp_path, monkeypatch):
    """Each process has its share of the rows; what they add up to is the baseline of both."""
    from tunesmith.train import forward_batches

    run = Run(tmp_path)
    whole, shares = float(run.baseline()), []
    for process in (0, 1):
        monkeypatch.setattr(forward_batches, "share_by_length", lambda step, process=process: step.share(process, 2))
        monkeypatch.setattr(RunSession, "all_reduce", lambda self, value: shares.append(float(value)) or value)
        run.baseline()
    assert math.fsum(shares) / len(ALONE) == pytest.approx(whole, rel=1e-6)  # fp32: other batches round otherwise


keys = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(keys)
@settings(deadline=None)
def test_a_partner_is_the_nearest_row_before_that_has_another_prompt(chosen):
    count = len(chosen)
    found = other_response._nearest_other_key(np.array(chosen, np.int64)).tolist()
    for place, partner in enumerate(found):
        others = [(place - back) % count for back in range(1, count) if chosen[(place - back) % count] != chosen[place]]
        assert partner == (others[0] if others else (place - 1) % count)


class Prompts(SimpleNamespace):
    """An ``Encoded`` of nothing but prompts."""

    def __len__(self):
        return len(self.source)


def of_sources(keys, source):
    """Prompts, some of each source."""
    kept = [np.flatnonzero(source == number) for number in range(int(source.max()) + 1)]
    entries = [
        SimpleNamespace(values={"prompt_key": keys[mine]}, starts={"prompt_key": np.arange(len(mine) + 1)}) for mine in kept
    ]
    example = np.zeros(len(keys), np.int64)
    for mine in kept:
        example[mine] = np.arange(len(mine))
    return Prompts(entries=entries, source=source, views=SimpleNamespace(example=example))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=30))
@settings(deadline=None)
def test_a_partner_has_another_prompt_and_the_same_source_where_it_can(rows):
    prompt, source = (np.array(values, np.int64) for values in zip(*rows))
    partners = other_response.find_partners(of_sources(prompt, source))
    for index, partner in enumerate(partners):
        several = len(set(prompt[source == source[index]])) > 1
        assert prompt[partner] != prompt[index] or len(set(prompt)) == 1
        assert source[partner] == source[index] or not several


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("max_length", [24, 30, 41])
def test_a_pair_is_within_max_length_and_keeps_the_response_and_the_first_token(tmp_path, max_length, adds_bos):
    rows = [
        {
            "prompt": "question" + " what is the" * (n % 5) + f" {n // 2}",
            "completion": " " + "x" * (1 + 5 * n % 17),
            "label": n % 2,
        }
        for n in range(16)
    ]
    _, found = prepared(tmp_path, rows, max_length, adds_bos)
    data, cut = found.train, 0
    partners = other_response.find_partners(data)
    for index in range(len(data)):
        example, other = data[index], data.stored(int(partners[index]))
        pair = other_response.mismatched_pair(example)
        prompt, response = pair["answers"].tolist()
        own, theirs = (int(one["answers"][0]) for one in (example, other))
        assert len(pair["input_ids"]) == len(pair["supervised"]) == prompt + response <= max_length
        assert pair["input_ids"][prompt:].tolist() == other["input_ids"][theirs:].tolist()
        assert (
            not pair["supervised"][:prompt].any()
            and pair["supervised"][prompt:].tolist() == other["supervised"][theirs:].tolist()
        )
        kept = int(adds_bos)
        assert pair["input_ids"][:kept].tolist() == example["input_ids"][:kept].tolist()
        assert pair["input_ids"][kept:prompt].tolist() == example["input_ids"][own - (prompt - kept) : own].tolist()
        assert example["prompt_key"] != other["prompt_key"]
        cut += prompt < own
    assert cut, "some prompt was cut"


def test_no_mismatched_pairs_are_made_without_a_baseline(tmp_path):
    _, found = prepared(tmp_path, loss_type="apo_zero_unpaired")
    assert "other_ids" not in found.train[0]
    assert "kl" not in Run(tmp_path, loss_type="apo_zero_unpaired").loss()[1]


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(("good", "missing"), [(True, "undesirable"), (False, "desirable")])
def test_rows_of_one_kind_are_refused(tmp_path, good, missing):
    made = recipe(tmp_path, objective="kto")
    written(tmp_path, [{**row, "label": good} for row in judged(6)])
    with pytest.raises(DataError, match=f"KTO needs {missing} rows, too"):
        tunesmith.train(made, out=tmp_path / "run")


def test_an_imbalance_is_reported_with_the_weight_to_set(tmp_path):
    rows = [{**row, "label": n % 5 == 0} for n, row in enumerate(judged(10))]
    (note,) = prepared(tmp_path, rows)[0].notes
    assert "2 desirable and 8 undesirable rows" in note and "Set desirable_weight between 4 and 5.33" in note
    assert not prepared(tmp_path, rows, desirable_weight=4.0)[0].notes


def test_held_out_figures_are_the_same_for_any_batch_budget(tmp_path):
    found = []
    for number, split in enumerate(({}, {"micro_batch_tokens": 60, "packing": "off"})):
        made = recipe(tmp_path, objective="kto", max_steps=2, eval_steps=2, **split)
        made["data"]["eval"] = {"path": written(tmp_path, judged(9), "held.jsonl")}
        tunesmith.train(made, out=tmp_path / str(number))
        records = metrics_file.read(tmp_path / str(number) / "metrics.jsonl")
        last = [record for record in records if record["kind"] == "eval"][-1]
        found.append({name: value for name, value in last.items() if name.startswith("eval_")})
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "loss")
    assert found[0].keys() >= {f"eval_{name}" for name in names}
    assert found[0]["eval_rewards/margins"] != 0
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_held_out_figures_are_the_formulas(tmp_path):
    rows = judged(9)
    run = Run(tmp_path, rows, beta=0.02, **WEIGHTS)
    records = [run.objective.evaluate(run.policy, run.step.micro(places, PADDED).batch) for places in run.step.split(60, PADDED)]
    figures = run.objective.summarise(records)
    own, _ = both_kinds(rows, before_it(rows))
    _, kl = by_hand(run, rows)
    with torch.no_grad():
        logps, before = plain_logps(run.policy, own), plain_logps(run.before, own)
    ratios, good = (logps - before).tolist(), [row["label"] for row in rows]
    value = [expit(-0.02 * (r - kl)) if one else 0.7 * expit(0.02 * (r - kl)) for r, one in zip(ratios, good)]
    chosen = [0.02 * r for r, one in zip(ratios, good) if one]
    rejected = [0.02 * r for r, one in zip(ratios, good) if not one]
    assert figures["eval_loss"] == pytest.approx(np.mean(value), rel=1e-5)
    assert figures["eval_loss_stderr"] == pytest.approx(np.std(value, ddof=1) / math.sqrt(len(value)), rel=1e-4)
    assert figures["eval_kl"] == pytest.approx(kl, rel=1e-5)
    assert figures["eval_rewards/chosen"] == pytest.approx(np.mean(chosen), rel=1e-4)
    assert figures["eval_rewards/margins"] == pytest.approx(np.mean(chosen) - np.mean(rejected), rel=1e-4)
    assert figures["eval_logps/rejected"] == pytest.approx(np.mean([x for x, one in zip(logps.tolist(), good) if not one]))


def expit(x):
    return 1 / (1 + math.exp(-x))


def test_a_set_keeps_its_figures_next_to_other_sets(tmp_path):
    """Its pairs are made of its own rows."""
    sets = {name: {"path": written(tmp_path, rows, f"{name}.jsonl")} for name, rows in (("one", ALONE), ("two", judged(9)))}
    figures = {}
    for chosen in (["one", "two"], ["two"]):
        made = recipe(tmp_path, objective="kto", max_steps=1, eval_steps=1)
        made["data"]["eval"] = {"sets": {name: sets[name] for name in chosen}}
        tunesmith.train(made, out=tmp_path / "-".join(chosen))
        records = metrics_file.read(tmp_path / "-".join(chosen) / "metrics.jsonl")
        figures[len(chosen)] = [
            {k: v for k, v in one.items() if k.startswith("eval_two")} for one in records if one["kind"] == "eval"
        ]
    assert figures[1] == figures[2] and "eval_two_kl" in figures[1][0]


def test_samples_show_no_undesirable_response_as_the_reference(tmp_path):
    made = recipe(tmp_path, objective="kto", max_steps=1, eval_steps=1)
    made["data"]["eval"] = {"path": written(tmp_path, judged(2), "held.jsonl")}
    made["samples"] = {"count": 2, "max_new_tokens": 3}
    tunesmith.train(made, out=tmp_path / "run")
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["reference"] for one in shown[:2]] == [judged(2)[0]["completion"], None]


def test_eight_judgements_are_memorised(tmp_path):
    """Desirable responses become likely and undesirable ones unlikely, though each prompt has one of both."""
    made = recipe(tmp_path, objective="kto", count=8, batch_size=8, max_steps=60, logging_steps=1)
    tunesmith.train(made, out=tmp_path / "run")
    records = [one for one in metrics_file.read(tmp_path / "run" / "metrics.jsonl") if one["kind"] == "train"]
    first, last = records[0], records[-1]
    assert last["loss"] < 0.1 < first["loss"]
    assert last["logps/chosen"] > first["logps/chosen"] / 2 and last["logps/rejected"] < 2 * first["logps/rejected"]
    assert last["rewards/chosen"] > 1 and last["rewards/rejected"] < -1


def test_at_step_0_the_policy_is_its_own_reference(tmp_path):
    made = recipe(tmp_path, objective={"type": "kto", **WEIGHTS}, batch_size=12, max_steps=1)
    tunesmith.train(made, out=tmp_path / "run")
    (record,) = [one for one in metrics_file.read(tmp_path / "run" / "metrics.jsonl") if one["kind"] == "train"]
    assert record["loss"] == pytest.approx((1.0 + 0.7) / 4, abs=1e-5) and record["kl"] == pytest.approx(0, abs=1e-4)


def test_one_of_the_two_weights_is_set():
    with pytest.raises(ValueError, match=r"not both.*set desirable_weight to 2"):
        kto.Config(desirable_weight=1.5, undesirable_weight=0.75)
