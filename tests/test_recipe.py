from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from tests import recipe_keys
from tests.matrix.cells import CELLS
from tunesmith import adaptations, objectives, recipe
from tunesmith.data.data_config import DataConfig, EvalConfig, GenerateConfig, Source
from tunesmith.errors import RecipeError
from tunesmith.recipe import text as recipe_text
from tunesmith.recipe import validation
from tunesmith.rollout.rewards import Reward
from tunesmith.train.train_config import SampleConfig, TrainConfig

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SMALL = {"model": "m", "data": {"train": [{"path": "x.json"}]}}


def refused(*overrides, raw=SMALL):
    with pytest.raises(RecipeError) as error:
        recipe.parse(raw, overrides)
    return str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_repeats_when_resolved(path):
    loaded = recipe.load(path)
    text = yaml.safe_dump(loaded.resolved(), allow_unicode=True)
    assert recipe.parse(recipe_text.read(text, "again")[0]) == loaded
    assert loaded.model in recipe.brief(loaded)


def test_rewards_are_shown_as_the_recipe_has_them():
    items = [{"type": "length", "max": 30, "unit": "words"}, {"type": "final_stop", "weight": 0.5}]
    built = recipe.parse({**SMALL, "objective": {"type": "grpo", "rewards": items}})
    assert "rewards {type: length, max: 30, unit: words}, {type: final_stop, weight: 0.5}" in recipe.brief(built)


def test_defaults_are_sft_and_lora():
    built = recipe.parse(SMALL)
    assert (objectives.name_of(built.objective), adaptations.name_of(built.adaptation)) == ("sft", "lora")


def test_a_key_of_a_part_that_the_recipe_leaves_out_belongs_to_its_default():
    built = recipe.parse(SMALL, ["adaptation.r=16", "objective.train_on=all"])
    assert (built.adaptation.r, built.objective.train_on) == (16, "all")


def test_paths_may_be_path_objects():
    assert recipe.parse({"model": Path("m"), "data": {"train": ({"path": Path("x.json")},)}}) == recipe.parse(SMALL)


def test_the_error_for_a_missing_recipe_shows_how_to_make_one(tmp_path):
    with pytest.raises(RecipeError, match="tunesmith init"):
        recipe.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2]", b"", b"text"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        recipe.load(path)


def test_an_error_names_the_line_of_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata:\n  train:\n    - path: x.json\n      weigth: 2\ntrain:\n  epochs: many\n")
    with pytest.raises(RecipeError) as error:
        recipe.load(path, ["seed=-1"])
    assert f"{path}, line 5: unknown key `data.train.0.weigth`. Did you mean `weight`?" in str(error.value)
    assert f"{path}, line 7: `train.epochs`: expected a valid number, got 'many'" in str(error.value)
    assert "override 'seed=-1': `seed`: expected greater than or equal to 0, got -1" in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size='8'", ["`train.batch_size`", "valid integer", "'8'"]),
        ("train.batch_size=true", ["`train.batch_size`", "True"]),
        ("train.batch_size=8.5", ["`train.batch_size`", "8.5"]),
        ("train.epochs=true", ["`train.epochs`", "True"]),
        ("train.shuffle=1", ["`train.shuffle`", "valid boolean"]),
        ("train.packing=no", ["`train.packing`", "'auto' or 'off'", "'no'"]),
        ("train.eval_steps=often", ["`train.eval_steps`", "valid number or 'epoch'", "'often'"]),
        ("train.eval_steps=-1", ["eval_steps must be a whole number"]),
        ("train=3", ["`train`", "3"]),
        ("data.train=x.json", ["`data.train`", "list"]),
        ("data.train=[]", ["`data.train`"]),
        ("data.train=[x.json]", ["`data.train.0`", "x.json"]),
        ("model=3", ["`model`", "valid string"]),
        ("objective=sfd", ["`objective`: unknown type 'sfd'", "Did you mean `sft`?"]),
        ("adaptation=[lora]", ["`adaptation`", "mapping with `type`"]),
        ("adaptation={r: 8}", ["the key `adaptation.type` is missing", "full", "lora"]),
        ("adaptation.type=qlor", ["`adaptation`: unknown type 'qlor'"]),
        ("data={}", ["the key `data.train` is missing"]),
    ],
)
def test_wrong_values_are_named(override, words):
    message = refused(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.eval.path=e.json", "data.eval.fraction=0.2"], "data.eval.path or data.eval.fraction, not both"),
        (["data.eval.sets.a.path=e.json", "data.eval.fraction=0.2"], "data.eval.sets or data.eval.fraction, not both"),
        (["data.eval.sets.a.path=e.json", "data.eval.path=b.json"], "data.eval.path or data.eval.sets, not both"),
        (["data.eval.sets.a.path=e.json", "data.eval.limit=4"], "data.eval.limit does nothing next to data.eval.sets"),
        (["data.eval.sets={a: {path: e.json, weight: 2}}"], "data.eval.sets.a.weight does nothing"),
        (["data.eval.sets={}"], "expected at least one set"),
        (["data.train.0.split=test"], "data.train.0.split does nothing: x.json is no data set of the Hub"),
        (["data.train.0.name=en", "data.train.0.streaming=true"], "data.train.0.streaming does nothing"),
        (["data.eval.sets={a: {path: e.json, split: test}}"], "data.eval.sets.a.split does nothing"),
        (["data.train=[{path: hub:a/b, streaming: true}]", "data.cache=false"], "data.cache=false: a stream is read once"),
        (["data.train.0.separator='|'"], "data.train.0.separator does nothing: sft learns from"),
        (["objective={type: classify, label_smoothing: 0.1}", "data.train.0.separator='|'"], "label_smoothing applies to one"),
        (["data.eval.path=hub:a/b"], "needs a split: data.eval.sets: {test: {path: hub:a/b, split: test}}"),
        (["data.train.0.path=hub:nobody"], "expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION, got 'hub:nobody'"),
        (["data.eval.sets={a b: {path: e.json}}"], "the name 'a b' must be made of"),
        (["data.eval.sets={a: {path: e.json, limti: 2}}"], "unknown key `data.eval.sets.a.limti`. Did you mean `limit`?"),
        (["data.eval.sets={a: {path: 3}}"], "`data.eval.sets.a.path`: expected a valid string, got 3"),
        (["data.eval.fraction=0", "data.eval.limit=4"], "data.eval.limit does nothing"),
        (["data.eval.fraction=0", "train.early_stopping_patience=2"], "needs held-out rows"),
        (["data.eval.fraction=0", "train.eval_steps=10"], "train.eval_steps does nothing"),
        (["objective=cpt", "data.template=alpaca"], "data.template does nothing: cpt learns from Text rows"),
        (["train.early_stopping_threshold=0.1"], "does nothing without train.early_stopping_patience"),
        (["train.early_stopping_patience=2", "train.eval_steps=null"], "early_stopping_patience needs eval_steps"),
        (["train.max_steps=10", "train.epochs=2"], "train.max_steps or train.epochs, not both"),
        (["train.warmup_ratio=0.1", "train.warmup_steps=2"], "warmup_ratio or warmup_steps, not both"),
        (["train.lr_scheduler_type=constant", "train.warmup_steps=2"], "use constant_with_warmup"),
        (["samples.prompts=[hello]", "samples.count=2"], "samples.prompts or samples.count, not both"),
        (["device_map=auto", "adapter=new"], "device_map: peft moves"),
        (["trust_remote_code=true", "add_tokens=[<a>]"], "how its vocabulary grows"),
        (["samples.count=0", "samples.max_new_tokens=8"], "samples.max_new_tokens does nothing"),
        (["objective={type: sft, expand_turns: true, train_on: all}"], "would train on the earlier answers again"),
        (["train.optim=adam"], "unknown optimiser 'adam'. Did you mean `adamw`?"),
        (["train.optim={eps: 1.0e-8}"], "the key `type` is missing"),
    ],
)
def test_choices_that_contradict_or_do_nothing_are_refused(overrides, words):
    assert words in refused(*overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["adaptation.type=full", "adaptation.loraplus_lr_ratio=16"],
            "`adaptation.loraplus_lr_ratio` belongs to `adaptation.type: lora` or `adaptation.type: qlora`. Choose that",
        ),
        (["objective={type: cpt, train_on: all}"], "`objective.train_on` belongs to `objective.type: sft`"),
    ],
)
def test_the_error_for_a_key_of_another_type_names_that_type(overrides, expected):
    assert expected in refused(*overrides) and "Did you mean" not in refused(*overrides)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.max_length=512", "`train.max_length`"),
        ("learning_rate=1e-4", "`train.learning_rate`"),
        ("train.lora_alpha=16", "`adaptation.lora_alpha`"),
        ("train.train_on=all", "`objective.train_on`"),
        ("objective={type: sft, seed: 3}", "`seed`"),
        ("data.eval.format=alpaca", "`data.train.0.format` or `data.eval.sets.NAME.format`"),
        ("data.tran=[]", "`train`"),  # a slip of a key that is here counts for more
    ],
)
def test_a_key_of_another_section_is_named_with_its_place(override, meant):
    assert f"Did you mean {meant}?" in refused(override)


@pytest.mark.parametrize(
    ("raw", "override", "said"),
    [
        ({"train": {"max_steps": 5}}, "train.epochs=2", "train.epochs=2 replaces train.max_steps: 5 of recipe"),
        ({"train": {"epochs": 3}}, "train.max_steps=5", "train.max_steps=5 replaces train.epochs: 3 of recipe"),
        ({"train": {"max_steps": 5}}, "train.epochs=1", "train.epochs=1 replaces train.max_steps: 5 of recipe"),
        ({"train": {"warmup_ratio": 0.1}}, "train.warmup_steps=5", "replaces train.warmup_ratio: 0.1"),
        ({"samples": {"prompts": ["hi"]}}, "samples.count=2", "replaces samples.prompts: ['hi']"),
        ({"data": {**SMALL["data"], "eval": {"fraction": 0.2}}}, "data.eval.path=e.json", "replaces data.eval.fraction: 0.2"),
        (
            {"data": {**SMALL["data"], "eval": {"path": "e.json"}}},
            "data.eval.sets.a.path=b.json",
            "replaces data.eval.path: e.json",
        ),
        ({"data": {**SMALL["data"], "eval": {"fraction": 0.05}}}, "data.eval.path=e.json", None),  # the default
        ({"train": {"epochs": 3}}, "train.max_steps=null", None),
    ],
)
def test_an_override_replaces_the_alternative_that_the_recipe_chose(raw, override, said):
    raw, notes = {**SMALL, **raw}, []
    before = repr(raw)
    built = recipe.parse(raw, [override], note=notes.append)
    assert (said is None and not notes) or said in notes[0]
    key, value = override.split("=")
    part, *_, name = key.split(".")
    if value != "null" and part == "train":
        assert str(getattr(built.train, name)).startswith(value)
    assert repr(raw) == before and recipe.parse(built.resolved()) == built


def test_two_overrides_that_are_alternatives_are_refused():
    assert "train.max_steps or train.epochs, not both" in refused("train.max_steps=5", "train.epochs=2")


def test_evaluation_sets_are_shown_and_kept():
    loaded = recipe.parse(SMALL, ["data.eval.sets={ko: {path: k.csv, limit: 5}, en: {path: e.json}}"])
    assert "eval        ko: k.csv limit 5  en: e.json" in recipe.brief(loaded)
    assert recipe.parse(loaded.resolved()) == loaded


def test_one_message_lists_all_mistakes():
    message = refused("objective=x", "adaptation.rr=1", "train.epoch=2", "seed=x")
    assert len(message.splitlines()) == 4


FREE = (
    "columns",
    "lr_scheduler_type",
    "optim",
    "r",
    "lora_alpha",
)  # mappings whose keys are the user's own, or another library's


def schema_keys(node, path=()):
    """(path of the mapping, key) for each key that the schema knows."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield path, key
            if key not in FREE:
                yield from schema_keys(child, (*path, key))
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from schema_keys(child, (*path, position))


def one_letter_off(word):
    """Every letter dropped, every two neighbours swapped, and each of some letters put in or in the place of one."""
    dropped = {word[:i] + word[i + 1 :] for i in range(len(word))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    added = {word[:i] + letter + word[i:] for i in range(len(word) + 1) for letter in "aes1"}
    changed = {word[:i] + letter + word[i + 1 :] for i in range(len(word)) for letter in "aes1"}
    return sorted((dropped | swapped | added | changed) - {word, ""})


def with_key_renamed(node, path, key, new):
    if isinstance(node, list):
        return [with_key_renamed(child, path[1:], key, new) if i == path[0] else child for i, child in enumerate(node)]
    if path:
        return {k: with_key_renamed(child, path[1:], key, new) if k == path[0] else child for k, child in node.items()}
    return {new if k == key else k: child for k, child in node.items()}


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.long)], ids=["some", "all"])
def test_every_key_with_one_letter_wrong_is_refused_and_the_right_one_named(stride):
    """Each key of the recipes once; a key of an objective or adaptation once for each type. Every ``stride``-th misspelling."""
    seen = set()
    for path in RECIPES:
        raw, _ = recipe_text.read(path.read_text(encoding="utf-8"), path.name)
        built = recipe.parse(raw)
        valid = everything_valid(built)
        for where, key in schema_keys(raw):
            mapping = tuple("*" if isinstance(part, int) else part for part in where)
            kind = type(getattr(built, mapping[0])).__module__ if mapping[:1] in (("objective",), ("adaptation",)) else None
            if (mapping, key, kind) in seen:
                continue
            seen.add((mapping, key, kind))
            for wrong in one_letter_off(key)[len(seen) % stride :: stride]:
                if wrong in valid.get(mapping, set()):
                    continue
                message = refused(raw=with_key_renamed(raw, where, key, wrong))
                suggestion = message.partition("Did you mean ")[2].partition("?")[0]
                assert f"`{key}`" in suggestion, (where, key, wrong, message)


def everything_valid(built):
    """Path of a mapping -> the keys valid there."""
    return {
        (): set(recipe.Recipe.model_fields),
        ("objective",): {"type", *type(built.objective).model_fields},
        ("adaptation",): {"type", *type(built.adaptation).model_fields},
        ("data",): set(DataConfig.model_fields),
        ("data", "train", "*"): set(Source.model_fields),
        ("data", "eval"): set(EvalConfig.model_fields),
        ("data", "eval", "generate"): set(GenerateConfig.model_fields),
        ("train",): set(TrainConfig.model_fields),
        ("samples",): set(SampleConfig.model_fields),
    }


def test_the_keys_are_the_frozen_ones():
    assert set(recipe.Recipe.model_fields) == recipe_keys.ROOT
    assert set(DataConfig.model_fields) == recipe_keys.DATA
    assert set(Source.model_fields) == recipe_keys.SOURCE
    assert set(EvalConfig.model_fields) == recipe_keys.EVAL
    assert set(GenerateConfig.model_fields) == recipe_keys.GENERATE
    assert set(TrainConfig.model_fields) == recipe_keys.TRAIN
    assert set(SampleConfig.model_fields) == recipe_keys.SAMPLES
    assert {name: set(objectives.module(name).Config.model_fields) for name in objectives.names()} == recipe_keys.OBJECTIVES
    assert {name: set(adaptations.module(name).Config.model_fields) for name in adaptations.names()} == recipe_keys.ADAPTATIONS


def test_fewer_than_70_keys_are_reachable_in_one_run():
    """Reinforcement learning has 25 more: sampling, rewards, advantages, the KL divergence and its clipped losses."""
    for objective, adaptation in {(cell.objective, cell.adaptation) for cell in CELLS}:
        valid = everything_valid(recipe.parse({**SMALL, "objective": objective, "adaptation": adaptation}))
        only_hold_others = 8  # objective, adaptation, data, train, samples, data.train, data.eval, data.eval.generate
        idle = recipe_keys.IDLE.get(objective, {})
        if "generate" in idle:
            del valid["data", "eval", "generate"]
        there = set().union(*valid.values())
        pairs = [pair for pair in recipe_keys.EITHER_OR if there.issuperset(pair) and not set(idle) & set(pair)]
        keys = sum(map(len, valid.values())) - only_hold_others - len(there & set(idle)) - fewest_that_touch(pairs)
        samples = objectives.module(objective).Objective.traits.samples
        assert keys < (95 if samples else 70), (objective, adaptation, keys)


@pytest.mark.parametrize(
    ("objective", "key", "part"), [(name, key, part) for name, idle in recipe_keys.IDLE.items() for key, part in idle.items()]
)
def test_a_key_that_would_do_nothing_is_refused(objective, key, part):
    value = {
        "template": "chatml",
        "template_kwargs": "{enable_thinking: false}",
        "special_tokens": "allow",
        "max_unlearnable": 0.5,
        "prompts": ["x"],
        "count": 2,
        "max_new_tokens": 5,
        "separator": ";",
        "neftune_noise_alpha": 5.0,
        "lora_dropout": 0.1,
        "max_minutes": 5.0,
        "generate": "{rows: 5}",
    }[key]
    with pytest.raises(RecipeError, match=f"{part}.{key}"):
        recipe.parse({**SMALL, "objective": objective, "adaptation": {"type": "lora"}}, [f"{part}.{key}={value}"])


def fewest_that_touch(pairs):
    """The size of the smallest set of keys that has one of every pair: so many must be left out of a run."""
    if not pairs:
        return 0
    return 1 + min(fewest_that_touch([pair for pair in pairs if key not in pair]) for key in pairs[0])


def test_a_key_in_two_pairs_is_left_out_once():
    assert fewest_that_touch([("a", "b"), ("b", "c")]) == 1
    assert fewest_that_touch([("a", "b"), ("b", "c"), ("a", "c"), ("d", "e")]) == 3


def test_every_key_is_described():
    for model in (recipe.Recipe, DataConfig, Source, EvalConfig, TrainConfig, SampleConfig):
        for name, field in model.model_fields.items():
            described = (
                field.description or name in PLAIN or field.annotation in (DataConfig, EvalConfig, TrainConfig, SampleConfig)
            )
            assert described, f"{model.__name__}.{name} has no description"


PLAIN = {
    "train", "format", "columns", "prompt_template", "epochs", "shuffle", "precision", 
    "warmup_ratio", "warmup_steps", "weight_decay", "logging_steps",
    "early_stopping_threshold", "max_new_tokens",
}  # fmt: skip
"""Keys whose name says all: transformers' own names, and the eval source's, described at the training source."""


class Listed(BaseModel):
    """A part of a recipe with a list of items, each of a type with keys of its own."""

    model_config = ConfigDict(extra="forbid")
    rewards: list[Reward]


ITEMS = [
    ({"type": "lenght", "target": 3}, r"rewards.0.type`: unknown type 'lenght'. Did you mean `length`\? Valid: contains, "),
    ({"target": 3}, "the key `objective.rewards.0.type` is missing. Valid: .*length, regex"),
    ({"type": "length", "target": "3"}, "`objective.rewards.0.target`: expected a valid integer, got '3'"),
    ({"type": "length", "targt": 3}, r"unknown key `objective.rewards.0.targt`. Did you mean `target`\? Valid: max, name, "),
    ({"type": "regex"}, "the key `objective.rewards.0.pattern` is missing"),
    ({"type": "length"}, "objective.rewards.0: set either target or max"),
]


@pytest.mark.parametrize(("item", "message"), ITEMS)
def test_an_error_in_an_item_of_a_list_names_its_key(item, message):
    with pytest.raises(RecipeError, match=message):
        validation._build(Listed, {"rewards": [item]}, recipe_text.Text("r.yaml"), ("objective",))


def test_a_python_reward_is_looked_for_in_the_folder_of_the_recipe(tmp_path):
    item = {"type": "python", "call": "my_rewards:brevity"}
    for text, folder in ((f"{tmp_path}/r.yaml", str(tmp_path)), ("r.yaml", ".")):
        source = recipe_text.Text(text, recipe_text.read("a: 1", text)[1])
        assert validation._build(Listed, {"rewards": [item]}, source).rewards[0].folder == folder
        kept = {**item, "folder": "kept"}
        assert validation._build(Listed, {"rewards": [kept]}, source).rewards[0].folder == "kept"
    assert validation._build(Listed, {"rewards": [item]}, recipe_text.Text("recipe")).rewards[0].folder is None
