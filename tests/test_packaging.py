"""Pinned versions, make targets and commands of the README exist and agree."""

import os
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tunesmith import recipe
from tunesmith.cli.main import VERBS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if not line.startswith("#")}


def test_what_make_installs_is_pinned_to_a_version_we_allow():
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["gguf"], *extras["dev"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins()[canonicalize_name(wanted.name)]), line


def test_an_installed_package_has_its_templates_and_sources():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["*"]
    for path in (ROOT / "src" / "tunesmith").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(path.match(pattern) for pattern in patterns), path


def test_torch_is_installed_first_and_at_the_pinned_version():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"$(PIP) torch=={pins()['torch']}\n" in makefile
    assert makefile.count(".venv/.torch pyproject.toml") == 2


def test_trl_is_for_tests_only():
    assert not any(Requirement(line).name == "trl" for line in PROJECT["dependencies"])


def test_ci_runs_what_people_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").split("\n")[-3:] == ["make check", "make test", ""]


def test_commands_of_the_pages_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        code = "\n".join(_code(page.read_text(encoding="utf-8")))
        assert set(re.findall(r"^make ([\w-]+)", code, re.MULTILINE)) <= targets, page
        assert set(re.findall(r"^tunesmith ([a-z]+)", code, re.MULTILINE)) <= set(VERBS), page


def _code(text):
    """Lines of code blocks, and code in the text."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return [*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_recipe_of_the_readme_is_one():
    block = re.search(r"```yaml\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert block
    assert recipe.parse(yaml.safe_load(block[1])).train.batch_size == 8


def test_the_licence_is_there():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
