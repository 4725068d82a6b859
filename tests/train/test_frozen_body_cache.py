"""Cached hidden states of a frozen body: computed once, found by content, and without effect on the result."""

import gc
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tunesmith
from tests.runs import apart, history, killed_before, recipe, weights
from tests.train.launching import forked
from tunesmith import files
from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.store import cache
from tunesmith.models.heads import lm_head
from tunesmith.models.network import base
from tunesmith.train import frozen_body_cache
from tunesmith.train.frozen_body_cache import CachedStates, Row, rows_of

HEAD = {"type": "features", "target_modules": ["lm_head"]}


def made_in(folder, name="llama", held_out=0.3, **keys):
    """Two epochs of the output layer alone, evaluated at each step, with the caches on."""
    made = recipe(
        folder,
        name,
        "sft",
        HEAD,
        **{"max_steps": None, "epochs": 2, "batch_size": 3, "eval_steps": 1 if held_out else None, **keys},
    )
    made["data"] |= {"eval": {"fraction": held_out}, "cache": True}
    return made


def forwards(monkeypatch):
    """Return a list that grows by the number of tokens of each pass through a body."""
    seen = []
    body = lm_head.hidden_states

    def counted(model, batch):
        seen.append(int(batch["input_ids"].numel()))
        return body(model, batch)

    monkeypatch.setattr(lm_head, "hidden_states", counted)
    return seen


def notes(run):
    return [line for line in json.loads((run / "manifest.json").read_text())["notes"] if "hidden states" in line]


def without(monkeypatch, made, out):
    with monkeypatch.context() as patch:
        patch.setattr(frozen_body_cache, "install", lambda *given: None)
        return tunesmith.train(made, out=out)


ALONE = [("llama", "bf16"), ("gpt2", "fp32"), ("mistral", "bf16")]
OTHERS = [("llama", "fp32"), ("gpt2", "bf16"), ("mistral", "fp32")]


@pytest.mark.parametrize(("name", "precision"), [*ALONE, *(pytest.param(*pair, marks=pytest.mark.long) for pair in OTHERS)])
def test_kept_and_computed_anew_are_bit_for_bit_the_same_where_rows_are_alone(name, precision, tmp_path, monkeypatch):
    made = made_in(tmp_path, name, precision=precision, micro_batch_tokens=1)
    kept = tunesmith.train(made, out=tmp_path / "kept")
    plain = without(monkeypatch, made, tmp_path / "plain")
    assert notes(tmp_path / "kept") and not notes(tmp_path / "plain")
    assert history(tmp_path / "kept") == history(tmp_path / "plain")
    assert apart(weights(kept["model_dir"]), weights(plain["model_dir"])) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("mistral", marks=pytest.mark.long)])
def test_kept_and_computed_anew_agree_to_rounding_among_neighbours(name, tmp_path, monkeypatch):
    made = made_in(tmp_path, name)
    tunesmith.train(made, out=tmp_path / "kept")
    without(monkeypatch, made, tmp_path / "plain")
    for ours, theirs in zip(history(tmp_path / "kept"), history(tmp_path / "plain"), strict=True):
        figures = {key for key in ours if key in ("loss", "eval_loss")}
        assert figures and all(abs(ours[key] - theirs[key]) <= 1e-6 * theirs[key] for key in figures)


def test_a_row_goes_through_the_body_once_and_in_the_next_run_never(tmp_path, monkeypatch):
    made = made_in(tmp_path, epochs=3)
    seen = forwards(monkeypatch)
    compute, after = frozen_body_cache._compute, []

    def marked(*given):
        del seen[:]
        compute(*given)
        after.append(len(seen))

    monkeypatch.setattr(frozen_body_cache, "_compute", marked)
    first = tunesmith.train(made, out=tmp_path / "first")
    assert after == [12] == [len(seen)], "twelve rows, training and evaluation, and nothing afterwards"
    second = tunesmith.train({**made, "train": {**made["train"], "learning_rate": 1e-3}}, out=tmp_path / "second")
    assert after == [12], "the second run computes none"
    assert "all 12 rows" in notes(tmp_path / "second")[0]
    assert apart(weights(first["model_dir"]), weights(second["model_dir"])) > 0
    third = {**made, "model": str(tmp_path / "first")}
    tunesmith.train(third, out=tmp_path / "third")
    assert after == [12, 12], "another model has outputs of its own"


def test_only_rows_that_are_new_are_computed(tmp_path):
    made = made_in(tmp_path, held_out=0)
    tunesmith.train(made, out=tmp_path / "first")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    more = [json.dumps({"prompt": "another", "completion": " row"}), *lines[::-1]]
    (tmp_path / "rows.jsonl").write_text("\n".join(more))
    tunesmith.train(made, out=tmp_path / "second")
    assert "1 of 13 rows to compute" in notes(tmp_path / "second")[0]


def test_only_what_a_loss_reads_is_kept(tmp_path):
    tunesmith.train(made_in(tmp_path, held_out=0), out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (folder,) = cache.store().glob("bodies-*/*")
    supervised = manifest["data"]["train"]["supervised_tokens"]
    assert (folder / "outputs.values").stat().st_size == supervised * 32 * 4
    assert supervised < manifest["data"]["train"]["tokens"]


def test_resumed_bit_for_bit_though_the_cache_is_gone(tmp_path):
    made = made_in(tmp_path, precision="bf16", epochs=3, save_steps=2)
    tunesmith.train(made, out=tmp_path / "straight")
    for folder in cache.store().glob("bodies-*/*"):
        files.remove_folder(folder)
    killed_before(4, made, tmp_path / "run")
    for folder in cache.store().glob("bodies-*/*"):
        files.remove_folder(folder)
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "straight")
    assert apart(weights(tmp_path / "run" / "model"), weights(tmp_path / "straight" / "model")) == 0


@pytest.mark.parametrize("damage", ["a byte", "cut short", "killed while writing"])
def test_what_is_damaged_is_made_anew(damage, tmp_path):
    made = made_in(tmp_path)
    tunesmith.train(made, out=tmp_path / "first")
    (folder,) = cache.store().glob("bodies-*/*")
    file = folder / "outputs.values"
    raw = bytearray(file.read_bytes())
    if damage == "a byte":
        raw[100] ^= 1
        file.write_bytes(raw)
    elif damage == "cut short":
        file.write_bytes(raw[:-1])
    else:
        (folder / "manifest.json").unlink()
        folder.rename(folder.with_name(f".{folder.name}.xyz"))
    tunesmith.train(made, out=tmp_path / "second")
    assert "12 of 12 rows to compute" in notes(tmp_path / "second")[0]
    assert history(tmp_path / "first") == history(tmp_path / "second")
    assert len(list(cache.store().glob("bodies-*/[!.]*"))) == 1


def test_shards_are_written_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_body_cache, "SHARD_BYTES", 3000)
    made = made_in(tmp_path)
    tunesmith.train(made, out=tmp_path / "first")
    assert len(list(cache.store().glob("bodies-*/*"))) > 2
    tunesmith.train(made, out=tmp_path / "second")
    assert "all 12 rows" in notes(tmp_path / "second")[0]
    assert history(tmp_path / "first") == history(tmp_path / "second")


def test_without_a_cache_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    made = made_in(tmp_path)
    made["data"]["cache"] = False
    tunesmith.train(made, out=tmp_path / "run")
    assert str(tmp_path / "temporary") in notes(tmp_path / "run")[0]
    assert not cache.store().exists() or not list(cache.store().iterdir())
    gc.collect()
    assert not list((tmp_path / "temporary").glob("tunesmith-bodies-*"))


def test_a_full_disk_is_reported_and_the_run_goes_on(tmp_path, monkeypatch):
    made = made_in(tmp_path)
    tunesmith.train(made, out=tmp_path / "kept")
    for folder in cache.store().glob("bodies-*/*"):
        files.remove_folder(folder)
    free, little = files.free_disk_bytes, files.MARGIN_BYTES + 1
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_disk_bytes", lambda path: little if "bodies-" in str(path) else free(path))
        tunesmith.train(made, out=tmp_path / "full")
    assert "each step computes" in notes(tmp_path / "full")[0] and "are free there" in notes(tmp_path / "full")[0]
    assert not list(cache.store().glob("bodies-*/*"))
    assert files.free_disk_bytes(tmp_path) > little
    ours, theirs = history(tmp_path / "kept"), history(tmp_path / "full")
    assert all(abs(a["eval_loss"] - b["eval_loss"]) < 1e-5 for a, b in zip(ours, theirs, strict=True) if "eval_loss" in a)


RANDOM = {
    "noise": ("llama", {"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha adds noise"),
    "dropout": ("gpt2", {}, {"resid_pdrop": 0.2}, "the body has dropout (0.2)"),
    "own": ("llama", {}, {}, "computes another result in training mode than in eval mode"),
}


@pytest.mark.parametrize("case", RANDOM)
def test_random_hidden_states_are_never_cached_and_the_reason_is_reported(case, tmp_path, monkeypatch):
    from tests.runs import model_folder
    from tunesmith.train import setup

    name, keys, changes, words = RANDOM[case]
    model_folder(tmp_path, name, **changes)
    made = made_in(tmp_path, name, **keys)
    if case == "own":
        build = setup.build

        def shaken(*given):
            built = build(*given)
            layer = base(built.model).model.layers[0].mlp
            layer.register_forward_hook(lambda module, given, out: out + torch.rand(1) * module.training)
            return built

        monkeypatch.setattr(setup, "build", shaken)
    tunesmith.train(made, out=tmp_path / "run")
    (said,) = notes(tmp_path / "run")
    assert "each step computes" in said and words in said
    assert not list(cache.store().glob("bodies-*"))


@pytest.mark.parametrize("adaptation", ["full", "lora", "features", {"type": "features", "target_modules": ["embed_tokens"]}])
def test_a_body_that_is_trained_is_left_alone(adaptation, tmp_path):
    made = {**made_in(tmp_path), "adaptation": adaptation}
    tunesmith.train(made, out=tmp_path / "run")
    assert not notes(tmp_path / "run") and not list(cache.store().glob("bodies-*"))


def test_two_processes_compute_half_each_and_make_the_update_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    made = made_in(tmp_path, epochs=1)
    assert forked(made, tmp_path / "run") == [0, 0]
    shards = sorted(len(cache.load(folder)) for folder in cache.store().glob("bodies-*/*"))
    assert shards == [6, 6]
    alone = tunesmith.train(made, out=tmp_path / "alone")
    assert "all 12 rows" in notes(tmp_path / "alone")[0]
    assert apart(weights(tmp_path / "run" / "model"), weights(alone["model_dir"])) < 1e-5


# ------------------------------------------------------------------------------------------------------ finding by content

EXAMPLES = st.lists(
    st.integers(1, 9).flatmap(
        lambda length: st.tuples(
            st.lists(st.integers(0, 3), min_size=length, max_size=length),
            st.lists(st.booleans(), min_size=length, max_size=length),
        )
    ),
    min_size=1,
    max_size=8,
)


def example(pair):
    ids, mask = pair
    return {"input_ids": np.array(ids, np.int32), "supervised": np.array(mask, np.bool_)}


def output_of(row):
    """Return stand-in hidden states, shape (positions, 2), computed from the row alone."""
    sums = np.cumsum(row.ids)
    return torch.tensor([[float(sums[place]), float(len(row.ids) * 100 + row.ids[0])] for place in row.places]).view(-1, 2)


@settings(max_examples=60, deadline=None)
@given(pairs=EXAMPLES, packed=st.booleans(), order=st.randoms(use_true_random=False), known=st.integers(0, 8))
def test_any_batch_of_known_rows_finds_its_own_outputs(pairs, packed, order, known, tmp_path_factory):
    """Short rows of four words: many are equal, or equal but for their places."""
    folder = tmp_path_factory.mktemp("bodies")
    layout = PACKED if packed else PADDED
    rows = [rows_of(shared_prompts.with_targets([example(pair)], PACKED))[0] for pair in pairs]
    kept = CachedStates(2, torch.float32)
    some = list({row.digest: row for row in rows[:known]}.values())
    if some:
        kept.write(folder, some, [output_of(row) for row in some])
    kept.read(folder)
    order.shuffle(pairs)
    batch = shared_prompts.with_targets([example(pair) for pair in pairs], layout)
    of_batch = rows_of(batch)
    assert [row.ids.tolist() for row in of_batch] == [ids for ids, _ in pairs]
    wanted = [row for row in of_batch if len(row.places)]
    have = {(row.ids.tobytes(), row.places.tobytes()) for row in some}
    found = kept(batch)
    if wanted and all((row.ids.tobytes(), row.places.tobytes()) in have for row in wanted):
        assert torch.equal(found, torch.cat([output_of(row) for row in wanted]))
        assert len(found) == len(batch["positions"])
    else:
        assert found is None


def test_two_rows_of_one_digest_are_distinguished(tmp_path, monkeypatch):
    monkeypatch.setattr(Row, "digest", property(lambda self: 7))
    kept = CachedStates(2, torch.bfloat16)
    first, second = (Row(np.array([1, word], np.int32), np.array([0], np.int32)) for word in (2, 3))
    kept.write(tmp_path, [first], [torch.ones(1, 2)])
    kept.read(tmp_path)
    assert kept.find(first) is not None and kept.find(second) is None


def test_the_key_knows_model_dtype_and_route(tmp_path):
    for name, keys in (("llama", {}), ("llama", {"precision": "bf16"}), ("llama", {"packing": "off"}), ("qwen3", {})):
        tunesmith.train(
            made_in(tmp_path, name, max_steps=1, epochs=1, **keys), out=tmp_path / f"{name}{len(os.listdir(tmp_path))}"
        )
    assert len(list(cache.store().glob("bodies-*"))) == 4
