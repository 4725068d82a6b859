"""Safetensors headers and JSON are checked before any library opens the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tunesmith.errors import ModelError
from tunesmith.models.find import headers


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_reads_names_shapes_and_dtypes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = headers.read_tensors(tmp_path)
    assert {name: (tensor.dtype, tensor.shape, tensor.count) for name, tensor in found.items()} == {
        "a": ("F32", (2, 3), 6),
        "b": ("BF16", (4,), 4),
    }


def test_reads_shards_through_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(headers.read_tensors(tmp_path)) == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"two\.safetensors, which is missing"):
        headers.read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "shard.bin"])
def test_an_index_may_not_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="of the same folder"):
        headers.read_tensors(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
INSANE = {
    "empty file": b"",
    "header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "header of no length": struct.pack("<Q", 0),
}
BROKEN = {
    "not JSON": b"{nope",
    "a list": [],
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "negative shape": {"a": {**ENTRY, "shape": [-2]}},
    "a hole": {"a": {**ENTRY, "data_offsets": [4, 12]}},
    "offsets beyond the file": {"a": {**ENTRY, "shape": [200], "data_offsets": [0, 800]}},
    "size against shape": {"a": {**ENTRY, "shape": [1]}},
    "overlap": {"a": ENTRY, "b": ENTRY},
}


@pytest.mark.parametrize("case", INSANE)
def test_refuses_an_insane_length(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(INSANE[case])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        headers.read_header(path)


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_a_header_that_does_not_fit_the_file(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "model.safetensors", BROKEN[case], bytes(8))
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        headers.read_header(path)


def test_refuses_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut short"):
        headers.read_header(path)


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{\n "a": 1,\n}')
    with pytest.raises(ModelError, match=r"config\.json, line 3"):
        headers.read_json(tmp_path / "config.json")
