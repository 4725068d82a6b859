import json
import sys

import pytest

from tunesmith import machine

MEBIBYTE = 2**20


def test_describe_is_plain_json_and_complete():
    described = machine.describe()
    assert json.loads(json.dumps(described)) == described
    assert set(described) == {"cpu", "cores", "threads", "isa", "class", "memory_bytes", "gpu", "os", "python", "versions"}
    assert described["cpu"]
    assert described["cores"] >= 1
    assert described["threads"] >= 1
    assert described["memory_bytes"] > 100 * MEBIBYTE
    assert set(described["versions"]) == set(machine.PACKAGES)
    assert described["versions"]["torch"]


@pytest.mark.parametrize(
    ("flags", "capability", "sets", "name"),
    [
        ({"fpu", "avx2", "avx512f", "avx512_bf16"}, "AVX512", ["avx2", "avx512f", "avx512_bf16"], "AVX512-BF16"),
        ({"avx2", "avx512f", "amx_bf16", "amx_tile"}, "AVX512", ["avx2", "avx512f", "amx_tile", "amx_bf16"], "AMX"),
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, "AVX2", ["avx2"], "AVX2 (emulated)"),
        ({"fpu", "avx2"}, "AVX2", ["avx2"], "AVX2"),
    ],
)
def test_instruction_sets_that_torch_was_told_to_leave_unused_do_not_count(monkeypatch, flags, capability, sets, name):
    monkeypatch.setattr(machine, "_cpu", lambda: ("a processor", flags))
    monkeypatch.setattr(machine.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert machine.instruction_sets() == sets
    assert machine.processor_class() == name


def test_a_package_that_is_not_installed_has_no_version():
    assert machine._version("no-such-package-as-this") is None


def test_cpuinfo_of_x86():
    first = "processor : 0\nmodel name : Some CPU @ 2 GHz\nflags : fpu avx2 amx_bf16\n"
    text = first + "\nprocessor : 1\nmodel name : other\nflags : fpu\n"
    assert machine._parse_cpuinfo(text) == ("Some CPU @ 2 GHz", {"fpu", "avx2", "amx_bf16"})


def test_cpuinfo_of_arm_has_no_name():
    name, flags = machine._parse_cpuinfo("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert name
    assert flags == {"fp", "asimd", "bf16"}


def test_memory_follows_what_is_allocated_and_the_peak_stays():
    before = machine.memory_bytes()
    block = bytearray(b"x" * 64 * MEBIBYTE)
    assert machine.memory_bytes() - before > 48 * MEBIBYTE
    del block
    assert machine.peak_memory_bytes() >= before + 48 * MEBIBYTE
    # The kernel counts both lazily, page by page and thread by thread, so they may cross by a little.
    assert machine.peak_memory_bytes() >= machine.memory_bytes() - MEBIBYTE


@pytest.mark.skipif(sys.platform != "linux", reason="compares two sources that only Linux has")
def test_the_two_sources_of_the_peak_agree():
    assert abs(machine._max_rss() * 1024 - machine.peak_memory_bytes()) < 8 * MEBIBYTE
