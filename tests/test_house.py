"""The house rules that a machine can check: who imports whom, how long a file is, what is never called."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "tunesmith"
FILES = sorted(SRC.rglob("*.py"))

# cli -> train.run -> {objectives, adaptations, models, data} -> errors: what a part must not import.
FORBIDDEN = {
    "errors": {"*"},
    "nearest": {"*"},
    "metrics": {"cli", "recipe", "train", "runs", "report", "evaluate", "merge", "objectives", "adaptations", "models", "data",
                "hub", "nearest", "peft"},
    "hub": {"cli", "recipe", "train", "runs", "report", "evaluate", "merge", "objectives", "adaptations", "models", "data",
            "metrics"},
    "data": {"cli", "recipe", "train", "runs", "report", "evaluate", "merge", "objectives", "adaptations", "models", "metrics"},
    "models": {"cli", "recipe", "train", "runs", "report", "evaluate", "merge", "objectives", "metrics"},
    "objectives": {"cli", "recipe", "train", "runs", "report", "evaluate", "merge", "adaptations"},
    "adaptations": {"cli", "recipe", "train", "runs", "report", "evaluate", "merge", "objectives", "data"},
    "merge": {"cli", "objectives", "data"},
    "evaluate": {"cli", "merge"},
    "train": {"cli"},
    "runs": {"cli", "report", "evaluate", "merge", "models", "objectives", "adaptations"},
    "report": {"cli", "recipe", "train", "evaluate", "merge", "objectives", "adaptations", "models", "data", "hub", "metrics"},
    "recipe": {"cli", "models", "evaluate", "merge"},
}  # fmt: skip

LONG_FILES: set[str] = {
    "train/fast_path.py",
    "train/forecast.py",
}  # src files that may pass 400 lines, each with a reason in its first comment

CODE_RUNNING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "socket"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "exec", "eval"}


OPENS_PICKLES = SRC / "models" / "find" / "unpickle.py"
"""The one file that calls torch.load: the program that ``models convert`` runs in a process of its own, for tensors alone."""

TRUSTED = "folder.remote_code"
"""The recipe's own word, the only value besides False: ``models.load.load`` hands it to transformers, in one place."""

CHOICES = {path.stem for part in ("objectives", "adaptations") for path in (SRC / part).glob("*.py")} - {"__init__"}


def part_of(path: Path) -> str:
    """``src/tunesmith/train/run.py`` -> train."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything that a file imports, also inside functions; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> str:
    """``torch.load`` of a call's function; "" for anything that is not a plain dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def passes_trust(node: ast.AST) -> list[int]:
    """The lines where ``trust_remote_code`` is given as anything but False: as a keyword, or as a key of a mapping."""
    given: list[ast.AST] = []
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
        given = [node.value]
    elif isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        given = [value for key, value in pairs if getattr(key, "value", None) == "trust_remote_code"]
    return [value.lineno for value in given if getattr(value, "value", None) is not False and ast.unparse(value) != TRUSTED]


def problems_in(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for name in sorted(imported(tree)):
        package, *rest = name.split(".")
        if package in CODE_RUNNING_MODULES:
            found.append(f"imports {name}")
        if package in ("transformers", "peft", "accelerate") and any(part.startswith("_") for part in rest):
            found.append(f"imports the private {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
            found.append(f"calls {dotted(node.func)} in line {node.lineno}")
        if isinstance(node, ast.List | ast.Tuple | ast.Call):
            words = [ast.unparse(part) for part in (node.args if isinstance(node, ast.Call) else node.elts)]
            if "'-m'" in words and "'-P'" not in words[: words.index("'-m'")]:
                found.append(f"starts a module without -P in line {node.lineno}: the current folder could replace it")
        for line in passes_trust(node):
            found.append(f"passes trust_remote_code in line {line}")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"catches everything in line {node.lineno}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_one_way(path):
    part = part_of(path)
    forbidden = FORBIDDEN.get(part, set())
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        package, _, rest = name.partition(".")
        if package == "tunesmith":
            target = rest.partition(".")[0]
            config = target == "train" and rest.startswith("train.config")
            assert target not in forbidden and ("*" not in forbidden or target == part), f"{part} imports {name}"
            assert part != "recipe" or target != "train" or config, "the recipe takes only its keys from train"
            by_name = target in ("objectives", "adaptations") and rest.split(".")[1:2] and rest.split(".")[1] in CHOICES
            assert part == target or not by_name, f"{part} knows {name} by name: take the one the recipe chose"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_nothing_runs_foreign_code(path):
    found = problems_in(path)
    if path == OPENS_PICKLES:
        assert len(found) == 1 and found[0].startswith("calls torch.load")
        assert "weights_only=True" in path.read_text(encoding="utf-8")
    else:
        assert found == []


def test_the_program_that_opens_pickles_is_never_imported():
    assert not [
        path for path in FILES if "tunesmith.models.find.unpickle" in imported(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_trust_is_passed_on_in_one_place():
    places = [
        str(path.relative_to(SRC))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == TRUSTED
    ]
    assert places == ["models/load/load.py"]


def test_only_two_files_touch_accelerate():
    touching = {
        str(path.relative_to(SRC))
        for path in FILES
        if any(name.partition(".")[0] == "accelerate" for name in imported(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert touching == {"train/distributed.py", "runs/trackers.py"}


def test_the_gate_catches_what_it_is_for(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nfrom transformers import _private\nimport peft._x.y\nimport torch, yaml\n"
        "torch.load('x')\nyaml.load('x')\nexec('x')\nf(trust_remote_code=True)\n"
        "f(**{'trust_remote_code': x})\n"
        "try:\n    f()\nexcept:\n    pass\n"
        "run([sys.executable, '-m', 'x'])\nagent('-m', 'x')\n"
    )
    assert len(problems_in(bad)) == 11
    good = tmp_path / "good.py"
    good.write_text(
        "run([sys.executable, '-P', '-m', 'x'])\nmodel.eval()\nyaml.safe_load('x')\nf(trust_remote_code=False)\nfrom __future__ import annotations\n"
    )
    assert problems_in(good) == []


def test_long_files_are_the_listed_ones():
    long = {str(path.relative_to(SRC)) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert long == LONG_FILES


def test_no_catch_all_names():
    banned = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    assert [path for path in FILES if path.stem in banned or path.parent.name in banned] == []


def test_every_module_imports_and_is_described():
    for info in pkgutil.walk_packages(tunesmith.__path__, "tunesmith."):
        module = importlib.import_module(info.name)
        if not (module.__file__ or "").endswith("__init__.py"):
            assert module.__doc__, f"{info.name} does not say what it is"


def test_public_functions_stay_functions_whatever_is_imported():
    for module in ("tunesmith.evaluate.run", "tunesmith.merge.run", "tunesmith.train.run"):
        importlib.import_module(module)
    for name in tunesmith.__all__:
        assert isinstance(getattr(tunesmith, name), types.FunctionType | str), name


@pytest.mark.parametrize(
    "statement",
    [
        "import tunesmith",
        "import tunesmith.recipe",
        "import tunesmith.cli.main",
        "import tunesmith.data.rows",
        "import tunesmith.report.run_page, tunesmith.report.task_page",
    ],
)
def test_imported_without_torch(statement):
    code = f"{statement}; import sys; assert not {{'torch', 'transformers', 'peft'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_recipe_is_checked_without_torch():
    recipe = ROOT / "recipes" / "sft-lora.yaml"
    code = f"from tunesmith.recipe import load; load({str(recipe)!r}); import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for path in (ROOT / name for name in listed.stdout.split("\0") if name) if path.is_file()]


def test_no_path_of_one_machine_in_any_file():
    private = re.compile("|".join(f"(?<![\\w.])/{folder}/[a-z.]" for folder in ("work", "tmp", "root", "home")))
    for path in tracked():
        found = private.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_nothing_large_or_pickled_is_tracked():
    for path in tracked():
        assert path.stat().st_size < 300_000, f"{path.relative_to(ROOT)} is large"
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".safetensors", ".gguf"), path.relative_to(ROOT)
