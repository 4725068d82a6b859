"""One process of ``tunesmith launch``. It runs the verb; the launcher prints its error."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tunesmith.cli.main import exit_program, main
from tunesmith.train import process_watch


def run(folder: Path, rank: int) -> int:
    """Run the ``arguments`` of ``folder/job.json``, whose ``command`` the user typed. Returns the exit code."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.argv = job["command"]
    process_watch.start(folder, rank)

    def record(error: BaseException, exit_code: int, as_json: bool = False) -> int:
        process_watch.write_note(folder, rank, error=error, exit_code=exit_code)
        return exit_code

    code = main(job["arguments"], record)
    if code == 0:
        process_watch.write_note(folder, rank, done=True)
        from tunesmith.train import distributed

        distributed.close()
    return code


if __name__ == "__main__":
    exit_program(run(Path(sys.argv[1]), int(os.environ["RANK"])))
