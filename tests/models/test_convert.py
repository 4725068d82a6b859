"""Pickled weights become safetensors, in another process; what is no weight is refused and never runs."""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import sys
import traceback
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM

import tunesmith
from tests.kill_points import in_fork
from tests.tiny import save_tiny, tiny_config
from tunesmith.cli.main import main
from tunesmith.errors import ModelError, UserError
from tunesmith.models.find import headers, unpickle
from tunesmith.models.find.convert import convert
from tunesmith.models.find.locate import locate


@pytest.fixture(scope="module")
def original_of(tmp_path_factory):
    """A function that returns (folder, weights) of a tiny model; each is made once."""
    originals = {}

    def made(architecture="llama", **changes):
        key = (architecture, *sorted(changes.items()))
        if key not in originals:
            folder = save_tiny(architecture, tmp_path_factory.mktemp("original"), **changes)
            originals[key] = folder, dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        return originals[key]

    return made


@pytest.fixture
def pickled(original_of, tmp_path):
    """Make a model folder as it was before safetensors, tied weights under both names. Returns it, the original, its weights."""

    def made(architecture="llama", name="pytorch_model.bin", dtype=torch.float32, **changes):
        original, weights = original_of(architecture, **changes)
        folder = tmp_path / "old"
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save({key: value.to(dtype) for key, value in weights.items()}, folder / name)
        return folder, original, dict(weights)

    return made


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


MODULE = sys.modules["tunesmith.models.find.convert"]
IN_A_PROCESS = MODULE._unpickle


@pytest.fixture(autouse=True)
def unpickled_here(monkeypatch):
    """Unpickle in this process, which gives the same files and errors: another one takes seconds to start."""

    def unpickled(pickles, targets, tied, job, say):
        monkeypatch.setattr(unpickle, "_report", say)
        try:
            return unpickle.convert(pickles, targets, tied)
        except SystemExit as error:
            raise MODULE._unpickle_error(pickles, str(error)) from None
        except pickle.UnpicklingError as error:
            raise MODULE._unpickle_error(pickles, "".join(traceback.format_exception(error))) from None

    monkeypatch.setattr(MODULE, "_unpickle", unpickled)


@pytest.fixture
def in_a_process(unpickled_here, monkeypatch):
    """The program itself."""
    monkeypatch.setattr(MODULE, "_unpickle", IN_A_PROCESS)


def logits(folder):
    model, _ = tunesmith.load(folder)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]])).logits


@pytest.mark.parametrize(
    ("architecture", "name", "changes"),
    [
        ("llama", "pytorch_model.bin", {}),
        ("llama", "weights.pt", {"tie_word_embeddings": False}),
        ("gpt2", "consolidated.pth", {}),
    ],
)
def test_the_copy_is_the_model_and_the_original_is_untouched(architecture, name, changes, pickled):
    folder, original, _ = pickled(architecture, name, **changes)
    before = digests(folder)
    done = convert(folder)
    assert digests(folder) == before and done["from"] == [name] and done["dtypes"] == ["F32"]
    assert torch.equal(logits(done["path"]), logits(original))
    assert headers.pickle_files(locate(done["path"]).path) == []
    assert headers.read_tensors(locate(done["path"]).path).keys() == headers.read_tensors(original).keys()


def test_tied_tensors_are_written_once_and_the_dtype_stays(tmp_path, pickled):
    folder, _, _ = pickled(dtype=torch.bfloat16)
    done = convert(folder, tmp_path / "new")
    tensors = headers.read_tensors(tmp_path / "new")
    assert "lm_head.weight" not in tensors and done["dtypes"] == ["BF16"]


def test_a_tensor_known_only_by_its_tied_name_is_kept(pickled):
    folder, original, weights = pickled()
    del weights["model.embed_tokens.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(logits(convert(folder)["path"]), logits(original))


def test_tensors_that_share_memory_are_written_apart(pickled):
    folder, original, weights = pickled()
    both = torch.stack([weights[f"model.layers.{layer}.input_layernorm.weight"] for layer in (0, 1)])
    weights |= {f"model.layers.{layer}.input_layernorm.weight": both[layer] for layer in (0, 1)}
    torch.save({"state_dict": weights, "epoch": 3}, folder / "pytorch_model.bin")
    assert torch.equal(logits(convert(folder)["path"]), logits(original))


def test_shards_keep_their_number_and_the_tie_across_them(in_a_process, pickled):
    folder, original, weights = pickled()
    items = list(weights.items())
    parts = {"pytorch_model-00001-of-00002.bin": dict(items[:7]), "pytorch_model-00002-of-00002.bin": dict(items[7:])}
    for name, part in parts.items():
        torch.save({key: value.clone() for key, value in part.items()}, folder / name)
    (folder / "pytorch_model.bin").unlink()
    listed = {key: name for name, part in parts.items() for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    said = []
    done = convert(folder, say=said.append)
    new = locate(done["path"]).path
    assert len(headers.weight_files(new)) == 2 and "lm_head.weight" not in headers.read_tensors(new)
    assert torch.equal(logits(new), logits(original))
    assert [line.split(",")[0] for line in said[:2]] == [f"reading {name}" for name in parts]


def test_the_old_format_without_a_zip_is_read(pickled):
    folder, original, weights = pickled()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(folder / "pytorch_model.bin")
    assert torch.equal(logits(convert(folder)["path"]), logits(original))


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_none(zipped, tmp_path, request, pickled):
    if zipped:
        request.getfixturevalue("in_a_process")
    folder, _, weights = pickled()
    loaded = {**weights, "model.bomb": Bomb(tmp_path / "ran")}
    torch.save(loaded, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    before = digests(folder)
    with pytest.raises(ModelError, match=r"asks for (posix|os)\.mkdir when it is opened"):
        convert(folder)
    assert not (tmp_path / "ran").exists() and digests(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # the bomb is one


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda weights: {**weights, "model.norm.weight": torch.ones(7)}, r"old: model.norm.weight has the shape \(7,\)"),
        (lambda weights: {key: value for key, value in weights.items() if "norm" not in key}, "missing"),
        (lambda weights: {**weights, "model.extra.weight": torch.ones(3)}, "unexpected: model.extra.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(content, words, tmp_path, pickled):
    folder, _, weights = pickled()
    torch.save(content(weights), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=words):
        convert(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}])
def test_what_holds_no_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(SystemExit, match="does not hold weights"):
        unpickle.convert([tmp_path / "x.bin"], [tmp_path / "x.safetensors"], {})


def test_a_damaged_pickle_is_a_model_error(pickled):
    folder, _, _ = pickled()
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be read as weights"):
        convert(folder)


def zip_of_a_text():
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/b.txt", "x")
    return made.getvalue()


def raw_pickle(folder, protocol):
    return pickle.dumps({"weight": Bomb(folder / "ran")}, protocol)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda _: b"hello, this is no model\n", "neither a whole zip archive nor torch's older format"),
        (lambda _: b"", "neither a whole zip archive"),
        (lambda _: pickle.dumps({"a": 1}), "neither a whole zip archive"),
        (lambda _: zip_of_a_text(), r"a zip archive without a data\.pkl"),
        (lambda folder: raw_pickle(folder, 0), r"a plain pickle that asks for (posix|os|nt)\.mkdir when it is opened"),
        (lambda folder: raw_pickle(folder, 4), r"a plain pickle that asks for (posix|os|nt)\.mkdir when it is opened"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_and_not_opened(content, words, tmp_path):
    (tmp_path / "x.bin").write_bytes(content(tmp_path))
    with pytest.raises(SystemExit, match=rf"x\.bin is no PyTorch checkpoint: {words}"):
        unpickle.convert([tmp_path / "x.bin"], [tmp_path / "x.safetensors"], {})
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_comes_with_what_to_do(pickled):
    folder, _, _ = pickled()
    (folder / "pytorch_model.bin").write_bytes(b"hello, this is no model\n")
    with pytest.raises(
        ModelError, match=r"(?s)is no PyTorch checkpoint: .*None of its code ran\.\n.*get the model as safetensors"
    ):
        convert(folder)


def test_what_is_no_work_is_refused(pickled):
    folder, original, _ = pickled()
    with pytest.raises(UserError, match="nothing to convert"):
        convert(original)
    with pytest.raises(UserError, match="exists already"):
        convert(folder, original)
    (folder / "pytorch_model.bin").rename(folder / "training_args.bin")
    with pytest.raises(ModelError, match="found none"):
        convert(folder)
    with pytest.raises(ModelError, match="no folder"):
        convert("nobody/knows")


def test_the_error_names_the_verb_and_the_verb_works(capsys, pickled):
    folder, _, _ = pickled()
    with pytest.raises(ModelError) as error:
        locate(folder)
    command = str(error.value).partition("Type: tunesmith ")[2].split()
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert locate(answer["path"]).kind == "full" and "reading pytorch_model.bin" in captured.err


def test_a_config_of_another_kind_of_model_is_checked_too(tmp_path):
    config = tiny_config("llama", vocab_size=64)
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(config)
    folder = tmp_path / "old"
    folder.mkdir()
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert convert(folder)["tensors"] == len(model.state_dict())


def test_a_full_disk_in_the_other_process_is_named_as_such(pickled, tmp_path):
    folder, original, _ = pickled()
    room = (original / "model.safetensors").stat().st_size - 1
    assert max(path.stat().st_size for path in original.glob("*.json")) < room, "settings fit, and weights do not"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        convert(folder, tmp_path / "new")

    code, answer = in_fork(limited)
    assert (code, answer.partition(":")[0]) == (3, "DiskFullError"), answer
    assert not (tmp_path / "new").exists() and [path.name for path in tmp_path.iterdir()] == ["old"]
