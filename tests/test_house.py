"""The house rules that a machine can check: who imports whom, how long a file is, what is never called."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "tunesmith"
FILES = sorted(SRC.rglob("*.py"))

# cli -> train.run -> {objectives, adaptations, models, data} -> errors: what a part must not import.
ABOVE = {
    "errors": "*", "suggestions": "*", "json_types": "*",
    "files": "cli synth recipe train runs report evaluate merge objectives adaptations models data metrics hub",
    "metrics": "cli synth recipe train runs report evaluate merge objectives adaptations models data hub peft rollout",
    "hub": "cli synth recipe train runs report evaluate merge objectives adaptations models data metrics rollout",
    "data": "cli synth recipe train runs report evaluate merge objectives adaptations models metrics rollout",
    "models": "cli synth recipe train runs report evaluate merge objectives adaptations metrics rollout",
    "objectives": "cli synth recipe train runs report evaluate merge adaptations",
    "rollout": "cli synth recipe train runs report evaluate merge objectives adaptations",
    "adaptations": "cli synth recipe train runs report evaluate merge objectives data rollout",
    "recipe": "cli synth models runs report evaluate merge",
    "runs": "cli synth train report evaluate merge models objectives adaptations rollout",
    "report": "cli synth recipe train evaluate merge models objectives adaptations data hub metrics rollout",
    "merge": "cli synth objectives data report rollout",
    "train": "cli synth evaluate",
    "pipeline": "cli synth",
    "evaluate": "cli synth merge",
    "synth": "cli recipe train runs report evaluate merge models objectives adaptations metrics",
}  # fmt: skip
FORBIDDEN = {part: {*others.split(), "pipeline"} - {part} for part, others in ABOVE.items()}

LONG_FILES: set[str] = set()  # src files that may pass 400 lines, each with a reason in its first comment

CODE_RUNNING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "socket"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "exec", "eval"}


OPENS_PICKLES = SRC / "models" / "find" / "unpickle.py"
"""The one file that calls torch.load: the program that ``models convert`` runs in a process of its own, for tensors alone."""

TRUSTED = "folder.remote_code"
"""The recipe's own word, the only value besides False: ``models.load.load`` hands it to transformers, in one place."""

GENERATE_BY_ENGINE = {"decode", "session", "tunesmith"}
"""The owners of a ``generate`` that is the engine's."""

PREFIXES = SRC / "models" / "adapters" / "virtual_tokens.py"
"""Prefix tuning puts its trained keys and values in front of a row as a cache."""

CHOICES = {path.stem for part in ("objectives", "adaptations") for path in (SRC / part).glob("*.py")} - {"__init__"}


WORDS = {"full", "features", "prefix", "prompt", "tag"}
"""Names of parts that are everyday words too: alone they may be the key of a row, or an element of a list of columns."""

ASKING = {"startswith", "endswith", "removeprefix", "removesuffix", "module"}
"""Methods that ask a string whether it is such a name, or a package for the part of that name."""

NAMESAKES = {
    "synth/python/draw.py": "kinds of rows that tunesmith makes",
    "recipe/foreign_values.py": "what other programs call objectives and adaptations",
    "pipeline/answer_comparison.py": "the key of a scored answer",
    "report/korean_records.py": "the name of a figure",
    "data/read/builtin.py": "the same kinds, as built-in data sets: builtin:classify",
}
"""Files in which such a name means something else."""


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


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


def is_safe_yaml(call: ast.Call) -> bool:
    """Return whether ruamel's ``YAML(...)`` builds plain data alone."""
    typ = next((keyword.value for keyword in call.keywords if keyword.arg == "typ"), None)
    return not call.args and isinstance(typ, ast.Constant) and typ.value == "safe"


def problems_in(path: Path) -> list[str]:
    tree = parsed(path.read_text(encoding="utf-8"))
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
        if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] == "YAML" and not is_safe_yaml(node):
            found.append(f"reads YAML with tags in line {node.lineno}: expected YAML(typ='safe', ...)")
        if isinstance(node, ast.List | ast.Tuple | ast.Call):
            parts = node.args if isinstance(node, ast.Call) else node.elts
            words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if "-m" in words and "-P" not in words[: words.index("-m")]:
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
    for name in imported(parsed(path.read_text(encoding="utf-8"))):
        package, _, rest = name.partition(".")
        if package == "tunesmith":
            target = rest.partition(".")[0]
            config = target == "train" and rest.startswith("train.train_config")
            assert target not in forbidden and ("*" not in forbidden or target == part), f"{part} imports {name}"
            assert part != "recipe" or target != "train" or config, "the recipe takes only its keys from train"
            by_name = target in ("objectives", "adaptations") and rest.split(".")[1:2] and rest.split(".")[1] in CHOICES
            assert part == target or not by_name, f"{part} knows {name} by name: take the one the recipe chose"


def module_of(path: Path, root: Path) -> str:
    """``src/tunesmith/train/run.py`` -> tunesmith.train.run; an ``__init__.py`` is its package."""
    parts = ("tunesmith", *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(files: Iterable[Path], root: Path) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports: at the top, inside functions and under ``if TYPE_CHECKING`` alike."""
    modules = {module_of(path, root): path for path in files}
    graph = {}
    for module, path in modules.items():
        names = imported(parsed(path.read_text(encoding="utf-8")))
        known = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (known & modules.keys()) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One shortest circle of each group of modules that all reach each other, from its first module back to itself."""
    reach = {module: reached(graph, module) for module in graph}
    found, seen = [], set()
    for module in sorted(graph):
        if module in reach[module] and module not in seen:
            seen |= {other for other in reach[module] if module in reach[other]}
            found.append(path_back(graph, module))
    return found


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All modules that ``start`` imports, directly or through others; itself only where there is a circle."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def path_back(graph: dict[str, set[str]], start: str) -> list[str]:
    """The shortest way along imports from ``start`` back to it."""
    ways = [[start]]
    while True:
        ways = [[*way, name] for way in ways for name in sorted(graph[way[-1]]) if name not in way[1:]]
        if closed := [way for way in ways if way[-1] == start]:
            return closed[0]


def test_no_module_imports_itself_through_others():
    found = [" -> ".join(circle) for circle in circles(import_graph(FILES, SRC))]
    assert not found, "import circles:\n" + "\n".join(found)


def test_circles_are_found_wherever_the_import_is(tmp_path):
    (tmp_path / "a.py").write_text("import tunesmith.b\n")
    (tmp_path / "b.py").write_text("def f():\n    from tunesmith.c import x\n")
    (tmp_path / "c.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tunesmith import a\n")
    (tmp_path / "d.py").write_text("from tunesmith import a, e\n")
    (tmp_path / "e.py").write_text("import json\n")
    graph = import_graph(sorted(tmp_path.glob("*.py")), tmp_path)
    assert circles(graph) == [["tunesmith.a", "tunesmith.b", "tunesmith.c", "tunesmith.a"]]
    graph["tunesmith.c"].clear()
    assert circles(graph) == []


def names_in(*nodes: ast.AST | None) -> list[str]:
    """The objectives and adaptations that these literals, and lists of literals, name."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            found += names_in(*node.elts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in CHOICES:
            found.append(node.value)
    return found


def asked_by_name(node: ast.AST) -> list[str]:
    """The parts whose name ``node`` compares with, tests membership of, matches, looks up or lists."""
    if isinstance(node, ast.Compare):
        return names_in(node.left, *node.comparators)
    if isinstance(node, ast.MatchValue):
        return names_in(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        names = names_in(*node.args[:1])
        return names if node.func.attr in ASKING else [name for name in names if name not in WORDS and node.func.attr == "get"]
    if isinstance(node, ast.Subscript):
        return [name for name in names_in(node.slice) if name not in WORDS]
    if isinstance(node, ast.Dict):
        names = names_in(*node.keys, *node.values)
    elif isinstance(node, ast.Tuple | ast.List | ast.Set) and all(isinstance(one, ast.Constant) for one in node.elts):
        names = names_in(node)
    else:
        return []
    return names if len(set(names)) > 1 or not set(names) <= WORDS else []


def leaks(path: Path, root: Path) -> list[str]:
    """``line 3: lora`` for each question that a file asks by the name of a part which is not its own."""
    tree = parsed(path.read_text(encoding="utf-8"))
    own = path.stem if path.parent in (root / "objectives", root / "adaptations") else ""
    found = {(node.lineno, name) for node in ast.walk(tree) for name in asked_by_name(node) if name != own}
    return [f"line {line}: {name}" for line, name in sorted(found)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_nobody_asks_a_part_for_its_name(path):
    found = leaks(path, SRC)
    if str(path.relative_to(SRC)) in NAMESAKES:
        assert found, "nothing to allow any more: take it out of NAMESAKES"
    else:
        assert not found, f"a string compared with a part's name is a missing trait of that part: {', '.join(found)}"


def test_questions_by_name_are_found(tmp_path):
    (tmp_path / "adaptations").mkdir()
    asking = [
        'kind == "lora"', 'kind in ("full", "features")', 'kind not in {"dpo", "reward"}', '"qlora" != kind', '"sft" in kinds',
        'kind.startswith("prefix")', 'kind.removesuffix("lora")', 'objectives.module("sft")', 'known["lora"]', 'known.get("qa")',
        'LISTED = ("lora", "ia3")', 'TABLE = {"LORA": "lora"}', 'TABLE = {"prefix": 1, "prompt": 2}',
    ]  # fmt: skip
    for number, text in enumerate(asking):
        (tmp_path / f"{number}.py").write_text(f"x = 1\n{text}\n")
        assert leaks(tmp_path / f"{number}.py", tmp_path), text
    (tmp_path / "match.py").write_text('match kind:\n    case "tag" | "cpt":\n        pass\n')
    assert leaks(tmp_path / "match.py", tmp_path) == ["line 2: cpt", "line 2: tag"]
    (tmp_path / "adaptations" / "lora.py").write_text('kind == "lora"\nkind == "qlora"\n')
    assert leaks(tmp_path / "adaptations" / "lora.py", tmp_path) == ["line 2: qlora"]
    (tmp_path / "words.py").write_text('row["prompt"]\nrow = {"prompt": 1, "answer": 2}\n("prompt", "text")\nDEFAULT = "lora"\n')
    assert leaks(tmp_path / "words.py", tmp_path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_nothing_runs_foreign_code(path):
    found = problems_in(path)
    if path == OPENS_PICKLES:
        assert len(found) == 1 and found[0].startswith("calls torch.load")
        assert "weights_only=True" in path.read_text(encoding="utf-8")
    else:
        assert found == []


def test_the_program_that_opens_pickles_is_never_imported():
    assert not [path for path in FILES if "tunesmith.models.find.unpickle" in imported(parsed(path.read_text(encoding="utf-8")))]


def test_trust_is_passed_on_in_one_place():
    places = [
        str(path.relative_to(SRC))
        for path in FILES
        for node in ast.walk(parsed(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == TRUSTED
    ]
    assert places == ["models/load/load.py"]


def other_generators(path: Path) -> list[str]:
    """Calls that generate text without the engine: ``generate`` of a network, or a forward pass that keeps a cache."""
    found = []
    for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func) if isinstance(node.func, ast.Attribute) and node.func.attr == "generate" else ""
        if called and called.split(".")[-2] not in GENERATE_BY_ENGINE:
            found.append(f"line {node.lineno}: {called}")
        for keyword in node.keywords:
            if keyword.arg == "past_key_values" or (keyword.arg == "use_cache" and ast.unparse(keyword.value) == "True"):
                found.append(f"line {node.lineno}: {keyword.arg}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_only_the_engine_generates_text(path):
    if path.parent != SRC / "models" / "generate" and path != PREFIXES:
        assert other_generators(path) == []


def test_other_loops_that_generate_are_found(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("model.generate(x)\nself.policy.generate(x)\nnetwork(x, use_cache=True)\nmodel(x, past_key_values=cache)\n")
    assert len(other_generators(bad)) == 4
    good = tmp_path / "good.py"
    good.write_text("decode.generate(m, x)\nself.session.generate(x)\nmodel(x, use_cache=False)\ngenerate(x)\n")
    assert other_generators(good) == []


def test_only_two_files_touch_accelerate():
    touching = {
        str(path.relative_to(SRC))
        for path in FILES
        if any(name.partition(".")[0] == "accelerate" for name in imported(parsed(path.read_text(encoding="utf-8"))))
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
        "YAML(typ='unsafe')\nruamel.yaml.YAML()\nYAML(typ=x)\n"
    )
    assert len(problems_in(bad)) == 14
    good = tmp_path / "good.py"
    good.write_text(
        "run([sys.executable, '-P', '-m', 'x'])\nmodel.eval()\nYAML(typ='safe', pure=True)\nf(trust_remote_code=False)\nfrom __future__ import annotations\n"
    )
    assert problems_in(good) == []


def test_long_files_are_the_listed_ones():
    long = {str(path.relative_to(SRC)) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert long == LONG_FILES


def words_a_thousand_lines(pattern: str) -> float:
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    return 1000 * sum(len(re.findall(pattern, text)) for text in texts) / sum(text.count("\n") for text in texts)


def test_types_can_be_seen():
    """``Any`` is for objects of other libraries that have no type; a question whether an attribute is there, too."""
    assert words_a_thousand_lines(r"\bAny\b") <= 12
    assert words_a_thousand_lines(r"\b(?:hasattr|getattr)\(") <= 1.5


def test_modules_have_names_of_their_own():
    """But for verbs of the command line and makers of rows, which are called what the user types."""
    names = [
        path.stem for path in FILES if path.stem not in ("__init__", "__main__") and not {"cli", "synth"} & set(path.parts[-3:-1])
    ]
    assert {name for name in names if names.count(name) > 1} == set()


def test_docstrings_begin_with_a_verb_or_a_thing():
    """A docstring does not begin with a preposition or a question word without a main clause."""
    dangling = re.compile(r"(Of|What|Whether|Which|How|Where) ")
    for path in FILES:
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                assert not dangling.match(first), f"{path.relative_to(SRC)}: {first}"


def test_no_catch_all_names():
    banned = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    assert [path for path in FILES if path.stem in banned or path.parent.name in banned] == []


def test_every_module_imports_and_is_described():
    for info in pkgutil.walk_packages(tunesmith.__path__, "tunesmith."):
        module = importlib.import_module(info.name)
        if not (module.__file__ or "").endswith("__init__.py"):
            assert module.__doc__, f"{info.name} does not say what it is"


def test_public_functions_stay_functions_whatever_is_imported():
    for module in ("tunesmith.evaluate.evaluate_model", "tunesmith.merge.merge_adapter", "tunesmith.train.run"):
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
