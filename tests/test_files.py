"""Files and folders are published whole or not at all, are synced before they are renamed, and lie under the user's home folder."""

import errno
import os
from pathlib import Path

import pytest

from tunesmith import files
from tunesmith.data.data_config import Source
from tunesmith.data.read import hub_set
from tunesmith.data.store import cache
from tunesmith.errors import DiskError, DiskFullError, UserError
from tunesmith.models.fast import kernels
from tunesmith.models.find import model_store

HOMES = {
    "data": cache.store,
    "models": model_store.models,
    "kernels": kernels.cache_folder,
    "datasets": lambda: hub_set.store_folder(Source(path="hub:org/name", split="train")).parent,
}
"""Folder name -> the function that gives it: all that is kept in the home folder."""


@pytest.mark.parametrize("name", HOMES)
@pytest.mark.parametrize(
    ("value", "home"), [("~/x", "USER/x"), ("", "USER/.cache/tunesmith"), (None, "USER/.cache/tunesmith"), ("USER/y", "USER/y")]
)
def test_every_part_reads_the_home_folder_alike(value, home, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("TUNESMITH_HOME")
    else:
        monkeypatch.setenv("TUNESMITH_HOME", value.replace("USER", str(tmp_path)))
    assert HOMES[name]() == Path(home.replace("USER", str(tmp_path)), name)


@pytest.fixture
def calls(monkeypatch):
    """The names of what is synced and renamed, in order."""
    found = []
    sync, rename, replace = files.sync, Path.rename, Path.replace
    monkeypatch.setattr(files, "sync", lambda path: (found.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (found.append(("rename", to.name)), rename(path, to))[1])
    monkeypatch.setattr(Path, "replace", lambda path, to: (found.append(("rename", to.name)), replace(path, to))[1])
    return found


def fill(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("new")


def test_a_folder_is_on_the_disk_before_its_name_is(tmp_path, calls):
    files.publish_folder(tmp_path / "model", fill, 0)
    synced = [name for kind, name in calls[: calls.index(("rename", "model"))] if kind == "sync"]
    assert synced[:2] == ["sub", "a"] and synced[2].startswith(".model.") and len(synced) == 3
    assert calls[-1] == ("sync", tmp_path.name)


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, calls):
    files.replace_file(tmp_path / "a.json", b"{}")
    (first, temporary), *rest = calls
    assert first == "sync" and temporary.startswith(".a.json.") and rest == [("rename", "a.json"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("number", range(1, 9))
def test_a_kill_at_any_point_leaves_the_old_folder_or_the_new_one(number, tmp_path):
    """The process is ended at its n-th sync or rename; ``recover`` is what the next one calls."""
    target = tmp_path / "model"
    files.publish_folder(target, lambda folder: (folder / "a").write_text("old") and None, 0)
    child = os.fork()
    if child == 0:
        left = [number]

        def counted(call):
            def wrapped(*args):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return call(*args)

            return wrapped

        files.sync, Path.rename = counted(files.sync), counted(Path.rename)
        files.publish_folder(target, fill, 0)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (9 if number <= 6 else 0)
    files.recover(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    old, new = target / "a", target / "sub" / "a"
    assert old.read_text() == "old" if old.exists() else new.read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("raised", [OSError, RuntimeError])
def test_a_full_disk_is_named_and_leaves_the_old_one(raised, number, tmp_path):
    """safetensors raises no OSError: it has the number in its message."""
    target = tmp_path / "model"
    files.publish_folder(target, fill, 0)

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(number, "no room") if raised is OSError else RuntimeError(f"I/O error: no room (os error {number})")

    with pytest.raises(DiskFullError, match=r"no room left to write .*model"):
        files.publish_folder(target, full, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (target / "sub" / "a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_a_disk_that_breaks_is_named(call, number, tmp_path, monkeypatch):
    """The error may come with a file, the folder, or the rename."""

    def broken(*args, **kwargs):
        raise OSError(number, "broken")

    files.publish_folder(tmp_path / "model", fill, 0)
    monkeypatch.setattr(Path, call, broken)
    with pytest.raises(DiskError, match=rf"model cannot be written: {os.strerror(number)}") as caught:
        files.publish_folder(tmp_path / "model", fill, 0)
    assert caught.value.exit_code == 3
    monkeypatch.undo()
    assert (tmp_path / "model" / "sub" / "a").read_text() == "new"


def test_the_old_folder_is_back_where_the_new_one_gets_no_name(tmp_path, monkeypatch):
    files.publish_folder(tmp_path / "model", fill, 0)
    rename = Path.rename

    def full(path, to):
        if path.name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "no room for a name")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(DiskFullError):
        files.publish_folder(tmp_path / "model", lambda folder: None, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "sub" / "a").read_text() == "new"


def test_other_errors_stay_themselves_and_leave_nothing(tmp_path):
    def broken(folder):
        (folder / "half").write_text("x")
        raise ValueError("not 28")

    with pytest.raises(ValueError, match="not 28"):
        files.publish_folder(tmp_path / "model", broken, 0)
    with pytest.raises(KeyboardInterrupt), files.publish_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_too_little_disk_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_disk_bytes", lambda path: files.MARGIN_BYTES + 99)
    with pytest.raises(DiskFullError, match="are free on its disk"):
        files.publish_folder(tmp_path / "model", fill, 100)
    assert not list(tmp_path.iterdir())


def test_a_new_folder_is_refused_where_something_is(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="merge writes a new folder"):
        files.new_target(tmp_path / "file", "merge")
    with pytest.raises(UserError, match=r"cannot be made: Not a directory\. Name another folder"):
        files.make_folder(tmp_path / "file" / "below")


def test_only_what_nobody_writes_to_is_removed_as_abandoned(tmp_path):
    for name, age in (("pull-old", 100.0), ("pull-new", 0.0)):
        folder = files.temporary_folder(tmp_path / name)
        (folder / "a").write_text("x")
        for path in (folder / "a", folder):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    files.remove_abandoned(tmp_path, ".pull-*", 50.0)
    assert [path.name.split(".")[1] for path in tmp_path.iterdir()] == ["pull-new"]


def test_elsewhere_than_on_posix_folders_are_not_synced(tmp_path, monkeypatch):
    opened = []
    file = tmp_path / "a"
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or 0)
    monkeypatch.setattr(os, "close", lambda handle: None)
    monkeypatch.setattr(os, "name", "nt")
    files.sync(tmp_path)
    files.sync(file)
    monkeypatch.undo()
    assert opened == [(file, os.O_RDWR)]


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path):
    assert files.free_disk_bytes(tmp_path / "runs" / "new") > 0
    assert files.free_disk_bytes(str(tmp_path)) > 0
