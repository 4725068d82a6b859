"""A finished model is loaded as it was saved or not at all: every file is hashed, and a flipped bit is found."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

import tunesmith
from tests.runs import recipe
from tests.tiny import save_tiny
from tunesmith.cli.main import main
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.merge import merge_adapter
from tunesmith.models.adapters.adapter_set import load_adapters
from tunesmith.models.find import headers, record, saved_files
from tunesmith.models.load import load

KINDS = {
    "full": ("llama", "sft", "full"),
    "lora": ("llama", "sft", "lora"),
    "head": ("bert", "classify", "full"),
    "adapter with a head": ("bert", "classify", "lora"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished model folders of every kind, not to be changed."""
    made = {}
    for kind, (name, objective, adaptation) in KINDS.items():
        folder = tmp_path_factory.mktemp("finished")
        tunesmith.train(recipe(folder, name, objective, adaptation, max_steps=1), out=folder / "run")
        made[kind] = folder / "run" / "model"
    made["merged"] = made["lora"].parent / "merged"
    merge_adapter.merge(made["lora"], made["merged"])
    return made


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(content))


def content(folder: Path) -> object:
    """The files as a library reads them: JSON of an adapter and of the record without spaces and the path of the base."""
    read = {}
    for path in sorted(set(folder.iterdir()) - {folder / "README.md"}):
        read[path.name] = path.read_bytes() if path.suffix != ".json" else json.loads(path.read_bytes())
        if path.name == "adapter_config.json":
            read[path.name] |= {"base_model_name_or_path": None}
    return read


def flips(finished: dict[str, Path], folder: Path, count: int) -> dict[str, int]:
    """Flip ``count`` random bits, one at a time, each in a copy. Returns how many were found, and how many are harmless."""
    counts = {"found": 0, "harmless": 0}
    draw = random.Random(20)
    copies = {kind: Path(shutil.copytree(model, folder / kind.replace(" ", "-"))) for kind, model in finished.items()}
    for number in range(count):
        kind = list(finished)[number % len(finished)]
        # half of the flips by file, so that small files have their share, half by byte
        files = [path for path in sorted(copies[kind].iterdir()) if path.is_file()]
        sizes = [path.stat().st_size for path in files]
        file = draw.choice(files) if number % 2 else draw.choices(files, sizes)[0]
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        try:
            load.load(copies[kind])
        except TunesmithError as error:
            assert file.name in str(error) or "base_model_name_or_path" in str(error), (str(file), bit, error)
            counts["found"] += 1
        else:
            assert content(copies[kind]) == content(finished[kind]), (str(file), bit)
            counts["harmless"] += 1
        flip(file, bit)
    return counts


def test_a_flipped_bit_anywhere_is_found_or_harmless(finished: dict[str, Path], tmp_path: Path) -> None:
    counts = flips(finished, tmp_path, 60)
    assert counts["found"] >= 50


@pytest.mark.long
def test_five_hundred_flipped_bits_are_found_or_harmless(finished: dict[str, Path], tmp_path: Path) -> None:
    counts = flips(finished, tmp_path, 500)
    print(f"\n500 flipped bits in finished models: {counts['found']} found, {counts['harmless']} harmless")
    assert counts["found"] >= 470


DAMAGE = {
    "an edited template": (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "chat_template.jinja"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), r"chat_template.jinja \(missing\)"),
    "other stop ids": (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [0]}'), "generation_config.json"),
    "an added file": (lambda folder: (folder / "added_tokens.json").write_text("{}"), r"added_tokens.json \(added\)"),
    "a weight": (lambda folder: flip(folder / "model.safetensors", 8 * 40_001), "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_door_names_the_damaged_file(damage: str, finished: dict[str, Path], tmp_path: Path, capsys) -> None:
    change, name = DAMAGE[damage]
    folder = Path(shutil.copytree(finished["full"], tmp_path / "model"))
    change(folder)
    made = recipe(tmp_path, max_steps=1) | {"model": str(folder)}
    for door in (
        lambda: tunesmith.load(folder),
        lambda: tunesmith.generate(folder, ["a"]),
        lambda: tunesmith.evaluate(folder, made["data"]["train"][0]["path"]),
        lambda: tunesmith.train(made, out=tmp_path / "run"),
    ):
        with pytest.raises(ModelError, match=f"{name} changed since the model was saved.*\n.*tunesmith verify"):
            door()
    assert main(["verify", str(folder), "--json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert not printed["ok"] and [one["path"] for one in printed["files"] if one["state"] != "ok"] == [
        name.split(" ")[0].replace("\\", "")
    ]
    if damage == "an edited template":
        assert main(["verify", str(folder), "--accept"]) == 0 and "all as saved" in capsys.readouterr().out
        tunesmith.load(folder)


def test_adapters_loaded_together_are_hashed(finished: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished["lora"], tmp_path / "model"))
    base = json.loads((folder / "tunesmith.json").read_text())["base"]["path"]
    load_adapters(base, {"a": folder})
    flip(folder / "adapter_model.safetensors", 8 * 4001)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors changed"):
        load_adapters(base, {"a": folder})


def test_a_changed_base_without_hashes_is_noticed_by_its_adapter(tmp_path: Path, capsys) -> None:
    made = recipe(tmp_path, adaptation="lora", max_steps=1)
    folder = tunesmith.train(made, out=tmp_path / "run")["model_dir"]
    weights = Path(made["model"]) / "model.safetensors"
    largest = max(headers.read_tensors(weights.parent).values(), key=lambda tensor: tensor.size)
    bit = 8 * (largest.start + largest.size // 4)  # not in a sample of the fingerprint
    before = record.fingerprint(weights.parent)
    flip(weights, bit)
    assert record.fingerprint(weights.parent) == before
    with pytest.raises(ModelError, match=r"the weights changed since the adapter .* was trained on them"):
        tunesmith.load(folder)
    assert main(["verify", folder]) == 2 and f"changed       {weights.parent}" in capsys.readouterr().out
    flip(weights, bit)
    tunesmith.load(folder)


def test_a_folder_of_another_program_has_nothing_to_compare_and_can_get_it(tmp_path: Path, capsys) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    assert main(["verify", str(folder)]) == 0 and "nothing to compare with" in capsys.readouterr().out
    assert main(["verify", str(folder), "--accept"]) == 0
    (folder / "README.md").write_text("harmless")
    tunesmith.load(folder)
    flip(folder / "tokenizer.json", 8000)
    with pytest.raises(ModelError, match=r"tokenizer\.json changed"):
        tunesmith.load(folder)


def test_a_run_is_verified_with_its_checkpoints(tmp_path: Path, capsys) -> None:
    made = recipe(tmp_path, max_steps=2, save_steps=1)
    tunesmith.train(made, out=tmp_path / "run")
    assert tunesmith.verify(tmp_path / "run")["ok"]
    state = sorted((tmp_path / "run" / "checkpoints").glob("*/state.safetensors"))[-1]
    flip(state, 8 * 2000)
    assert main(["verify", str(tmp_path / "run")]) == 2
    out = capsys.readouterr().out
    assert (
        f"changed       checkpoints/{state.parent.name}  (state.safetensors" in out
        and "ok            model/model.safetensors" in out
    )
    assert main(["verify", str(tmp_path / "run"), "--accept"]) == 2


def test_a_record_of_the_first_format_still_protects(finished: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished["full"], tmp_path / "model"))
    old = {key: value for key, value in record.read(folder).items() if key != "sha256"}
    old |= {"format": 1, "files": record.file_hashes(folder)}
    (folder / record.FILE).write_text(json.dumps(old))
    tunesmith.load(folder)
    assert tunesmith.verify(folder)["ok"]
    shutil.copyfile(save_tiny("llama", tmp_path / "other", seed=1) / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match="changed since the model was saved"):
        tunesmith.load(folder)


def test_a_record_that_names_files_elsewhere_is_not_followed(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    (tmp_path / "secret").write_text("x")
    record.write(
        folder, {"files": {"../secret": "0", "/dev/zero": "0", "config.json": saved_files.hash_files(folder)["config.json"]}}
    )
    states = {one["name"]: one["state"] for one in saved_files.verify(folder)}
    assert states["../secret"] == states["/dev/zero"] == "missing" and states["config.json"] == "ok"
