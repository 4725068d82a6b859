"""The tour of docs/architecture.md: the functions between the command and the loss are those that the page lists."""

import re
import sys
from pathlib import Path

import tunesmith
from tests.runs import recipe
from tunesmith.cli.main import main
from tunesmith.objectives import sft
from tunesmith.recipe.text import dump

SRC = Path(tunesmith.__file__).parent
PAGE = SRC.parents[1] / "docs" / "architecture.md"


def test_the_page_lists_the_functions_from_the_command_to_the_loss(tmp_path, monkeypatch, capsys):
    stacks, loss = [], sft.Objective.loss

    def watched(self, model, batch):
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(SRC):
                name = ".".join(Path(frame.f_code.co_filename).relative_to(SRC).with_suffix("").parts)
                frames.append(f"{name}.{frame.f_code.co_name}")
            frame = frame.f_back
        stacks.append(frames[::-1])
        return loss(self, model, batch)

    monkeypatch.setattr(sft.Objective, "loss", watched)
    (tmp_path / "tour.yaml").write_text(dump(recipe(tmp_path, max_steps=1)))
    assert main(["train", str(tmp_path / "tour.yaml"), "--out", str(tmp_path / "run")]) == 0
    walked = stacks[-1][stacks[-1].index("cli.train.train") :]
    listed = re.findall(r"^\| [1-9] \| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert walked == listed and len(listed) <= 5
