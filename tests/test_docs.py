"""Names, files and commands of the pages exist, and the tour of the README runs."""

import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from tests import recipe_keys
from tests.tiny import save_tiny
from tunesmith.cli import main as program
from tunesmith.models.find import model_store

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "tunesmith"
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*READMES, *DOCS]
FOLDERS = sorted(path.name for path in SRC.iterdir() if (path / "__init__.py").is_file())
FILES = {
    path.name for folder in (SRC, *(ROOT / name for name in ("benchmarks", "recipes", "tests"))) for path in folder.rglob("*.*")
}
KEYS = recipe_keys.ROOT | recipe_keys.DATA | recipe_keys.SOURCE | recipe_keys.EVAL | recipe_keys.TRAIN | recipe_keys.SAMPLES
KEYS |= {"type"}.union(*recipe_keys.OBJECTIVES.values(), *recipe_keys.ADAPTATIONS.values())


def page_id(path):
    return path.relative_to(ROOT).as_posix()


def blocks(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def spans(text):
    """`code` within the text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(text):
    """Words of every line of a code block that calls the program."""
    lines = [line for block in blocks(text, r"\w*") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tunesmith ")]


def exists(dotted):
    """Return whether a name such as ``train.loop.fit`` can be imported from the package."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["tunesmith", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            if not hasattr(found, name) and name not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, name, None)
        return True
    return False


def test_every_folder_has_a_page_and_the_index_lists_all():
    names = {path.name for path in DOCS} - {"README.md"}
    assert {f"{folder}.md" for folder in FOLDERS} <= names
    listed = re.findall(r"^\| \[([\w-]+\.md)\]", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(names)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_names_is_there(page):
    for span in spans(page.read_text(encoding="utf-8")):
        name = span.partition("(")[0].partition(":")[0].partition("=")[0].strip()
        if re.fullmatch(rf"({'|'.join(FOLDERS)}|recipe)(\.\w+)+", name) and name not in (
            "recipe.yaml",
            "metrics.jsonl",
            "report.html",
        ):
            assert exists(name) or set(name.split(".")[1:]) <= KEYS or name.endswith(".py"), f"{page.name}: {name}"
        if re.fullmatch(r"[\w/]+\.(py|c)", name):
            assert name.rpartition("/")[2] in FILES, f"{page.name}: {name}"


@pytest.mark.parametrize("folder", ["train", "runs", "models"])
def test_every_file_of_a_folder_is_explained(folder):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in sorted((SRC / folder).rglob("*.py")):
        assert path.name == "__init__.py" or f"`{path.name}`" in text, path.name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_of_a_page_parse(page):
    for verb, *words in commands(page.read_text(encoding="utf-8")):
        command = program.load(verb)
        if hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(verb, words)


def test_the_korean_readme_has_the_same_commands_code_and_links():
    english, korean = (path.read_text(encoding="utf-8") for path in READMES)
    assert commands(english) == commands(korean)
    assert blocks(english, "python") == blocks(korean, "python")
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) for text in (english, korean)]
    assert links[0] - {"README.ko.md"} <= links[1]
    assert "README.ko.md" in english.splitlines()[0] and "README.md" in korean.splitlines()[0]


@pytest.mark.parametrize("page", READMES, ids=page_id)
def test_a_readme_is_short(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) < 150


@pytest.fixture
def tour(tmp_path, monkeypatch):
    """The text of the README's tour, in a folder with its files and a tiny model for the real one."""
    model_store.models().mkdir(parents=True)
    model_store.install(save_tiny("llama", model_store.models() / "made"), "smollm2-135m", {"kind": "test"})
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(24)]
    pairs = [{"prompt": f"question {n}", "chosen": f"answer {n}", "rejected": f"no {n}"} for n in range(20)]
    labelled = [{"text": f"text {n}", "label": "odd" if n % 2 else "even"} for n in range(20)]
    single = [{"prompt": f"question {n}", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(20)]
    files = {
        "my.json": rows[:20],
        "judged.json": single,
        "held_out.json": rows[20:],
        "pairs.json": pairs,
        "labelled.json": labelled,
    }
    for name, part in files.items():
        Path(name).write_text(json.dumps(part), encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition("## Tour\n")[2].partition("\n## ")[0]


def test_the_tour_can_be_taken(tour, monkeypatch, capsys):
    # tests/train/test_launch.py starts real processes; here the command that each of them gets runs in this one.
    launcher = importlib.import_module("tunesmith.train.launch")
    monkeypatch.setattr(launcher, "launch", lambda processes, arguments: program.main(arguments))
    monkeypatch.setattr(importlib.import_module("tunesmith.train.forecast"), "MAX_SECONDS", 0.0)  # the fewest steps
    for words in commands(tour):
        if words[:2] == ["models", "pull"]:  # needs the network; the fixture installed the model
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        assert program.main(words) == 0, (words, capsys.readouterr())
    assert Path("merged/model.safetensors").is_file()


def test_the_python_of_the_tour_runs(tour, capsys):
    assert program.main(["init", "sft", "--data", "my.json", "--out", "sft-lora.yaml"]) == 0
    Path("recipes").mkdir()
    Path("sft-lora.yaml").rename("recipes/sft-lora.yaml")
    (code,) = blocks(tour, "python")
    exec(compile(code, "README.md", "exec"), {})
    before, arrow, after = capsys.readouterr().out.splitlines()[0].split()
    assert arrow == "->" and float(before) > float(after) > 0
