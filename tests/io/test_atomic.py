import contextlib
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from coremerge_jax.errors import FormatError
from coremerge_jax.io import atomic, outputs
from coremerge_jax.io.formats import open_adapter
from coremerge_jax.io.outputs import RECORD, fingerprint, write_record

KIND = "test"
MARK = b"<mark>"

atomic_folder = partial(atomic.atomic_folder, kind=KIND)
check_output = partial(outputs.check_output, kind=KIND)


def write(out, content="new", **options):
    with atomic_folder(out, **options) as folder:
        (folder / "marker").write_text(content)
        (folder / "more").mkdir()
        (folder / "more" / "data").write_text(content * 100)
        write_record(folder, KIND, {})


def fail(folder, error):
    (folder / "marker").write_text("half")
    raise error


def tree(folder):
    """All that is in a folder, hidden names included."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != RECORD
    }


NEW = {"out": None, "out/marker": "new", "out/more": None, "out/more/data": "new" * 100}


@pytest.fixture
def old(tmp_path):
    write(tmp_path / "out", "old")
    return tree(tmp_path)


def test_only_the_output_remains(tmp_path):
    write(tmp_path / "out")
    assert tree(tmp_path) == NEW


def test_missing_parents_are_made_and_on_failure_removed(tmp_path):
    write(tmp_path / "a" / "b" / "out")
    assert tree(tmp_path / "a" / "b") == NEW
    with (
        pytest.raises(RuntimeError),
        atomic_folder(tmp_path / "c" / "d" / "out"),
    ):
        raise RuntimeError
    assert not (tmp_path / "c").exists()


def test_what_a_killed_run_has_left_is_tidied_up(tmp_path):
    new, aside = (tmp_path / f".out.0123456789ab.{end}" for end in ("new", "old"))
    write(new, "half")
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == NEW
    # Killed between the two renames: what was there is in no other place.
    (tmp_path / "out").rename(aside)
    with pytest.raises(FormatError, match="already exists"):
        write(tmp_path / "out")
    assert tree(tmp_path) == NEW
    write(aside, "old")
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == NEW


KILLED = """
import os, signal, sys
from pathlib import Path
from coremerge_jax.io import atomic
from coremerge_jax.io.outputs import write_record
renames = []
def rename(self, target, original=Path.rename):
    renames.append(target)
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)
Path.rename = rename
with atomic.atomic_folder(sys.argv[1], kind="test", force=True) as folder:
    (folder / "marker").write_text("new")
    write_record(folder, "test", {})
"""


@pytest.mark.parametrize("rename", [1, 2])
def test_what_is_killed_before_a_rename_costs_nothing(tmp_path, old, rename):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), str(rename)]
    assert subprocess.run(command, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    if rename == 2:
        with pytest.raises(FormatError, match=r"moved it to .*/\.out\..*\.old: rename it back"):
            open_adapter(tmp_path / "out")
    with pytest.raises(FormatError, match="already exists"):
        write(tmp_path / "out")
    assert tree(tmp_path) == old


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("name", [RECORD, "marker"])
def test_what_is_killed_while_the_old_output_is_deleted_costs_nothing(tmp_path, monkeypatch, name):
    """Nor does a part of the old output ever come back."""

    def killed(folder, **_):
        (folder / name).unlink()

    monkeypatch.setattr(atomic.shutil, "rmtree", killed)
    write(tmp_path / "out", force=True)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "out").rename(tmp_path / "kept")
    write(tmp_path / "out")
    (tmp_path / "kept" / RECORD).unlink()
    for path in NEW:
        assert tree(tmp_path)[path.replace("out", "kept")] == tree(tmp_path)[path] == NEW[path]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_living_run_has_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "out") as first:
        (first / "marker").write_text("first")
        write(tmp_path / "out")
        assert (first / "marker").read_text() == "first"
        assert tree(tmp_path / "out") == {k[4:]: v for k, v in NEW.items() if k != "out"}
        write_record(first, KIND, {})
        with pytest.raises(FormatError, match="already exists"):
            check_output(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "other")
    assert tree(tmp_path / "out") == {"marker": "first"}


def test_folders_of_others_beside_the_output_are_left_alone(tmp_path):
    names = [".out.old", ".out.0123456789ab.new.zip", ".output.0123456789ab.new", "out.new"]
    for name in names:
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names}


def test_an_existing_output_is_replaced_only_by_force(tmp_path, old):
    with pytest.raises(FormatError, match="already exists"):
        write(tmp_path / "out")
    assert tree(tmp_path) == old
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == NEW


def test_only_a_folder_of_ours_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").touch()
    (tmp_path / "file").touch()
    for name, message in (("out", "has no coremerge.json.*'thesis'"), ("file", "not a folder")):
        with pytest.raises(FormatError, match=message):
            write(tmp_path / name, force=True)
    assert tree(tmp_path) == {"out": None, "out/thesis": "", "file": ""}
    (tmp_path / "out" / "thesis").unlink()
    (tmp_path / "file").unlink()
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == NEW


def remove(folder):
    (folder / RECORD).unlink()


def edit(folder, content):
    (folder / RECORD).write_text(content)


CHANGES = {
    "no record": (remove, "has no coremerge.json"),
    "a broken record": (lambda folder: edit(folder, "{"), "broken coremerge.json"),
    "a record of nothing": (lambda folder: edit(folder, "{}"), "names no files"),
    "files that are no object": (lambda folder: edit(folder, '{"files": 3}'), "names no files"),
    "a file more": (lambda folder: (folder / "more" / "notes").touch(), "did not write.*notes"),
    "a hidden file more": (lambda folder: (folder / ".env").touch(), "did not write.*env"),
    "a link more": (lambda folder: (folder / "link").symlink_to("/"), "did not write.*link"),
    "a pipe more": (lambda folder: os.mkfifo(folder / "pipe"), "did not write.*pipe"),
    "a changed file": (lambda folder: (folder / "marker").write_text("mine"), "changed.*marker"),
    "another kind": (
        lambda folder: edit(folder, (folder / RECORD).read_text().replace(KIND, "other")),
        "another kind",
    ),
}


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path, change):
    spoil, message = CHANGES[change]
    spoil(tmp_path / "out")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    with pytest.raises(FormatError, match=f"{message}.*choose another output"):
        write(tmp_path / "out", force=True)
    assert {path: path.lstat() for path in tmp_path.rglob("*")}.keys() == before.keys()


def test_what_comes_into_the_output_while_it_is_made_is_kept(tmp_path, old):
    def write_beside():
        with atomic_folder(tmp_path / "out", force=True) as folder:
            write_record(folder, KIND, {})
            (tmp_path / "out" / "notes").write_text("mine")

    with pytest.raises(FormatError, match="notes"):
        write_beside()
    assert tree(tmp_path) == {**old, "out/notes": "mine"}


@pytest.mark.usefixtures("old")
def test_a_folder_that_lost_a_file_is_replaced(tmp_path):
    (tmp_path / "out" / "marker").unlink()
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == NEW


def test_the_fingerprint_of_a_large_file_sees_its_ends_and_length(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "_WHOLE", 1000)
    monkeypatch.setattr(outputs, "_BLOCK", 16)
    file = tmp_path / "file"
    seen = set()
    for content in (bytes(5000), bytes(5001), b"1" + bytes(4999), bytes(4999) + b"1"):
        file.write_bytes(content)
        seen.add(fingerprint(file))
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["input", "input/out", "input/sub/out", ".", "linked", "linked/x"])
def test_an_output_may_not_touch_an_input(tmp_path, name):
    (tmp_path / "input").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "input")
    for source in (tmp_path / "input", tmp_path / "linked", tmp_path / "input" / ".." / "input"):
        with pytest.raises(FormatError, match=r"the input .*never changed"):
            check_output(tmp_path / name, inputs=["owner/name", source], force=True)
    check_output(tmp_path / "inputs", inputs=[tmp_path / "input"])


@pytest.mark.usefixtures("old")
def test_an_output_may_not_hold_what_an_input_links_to(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "weights").symlink_to(tmp_path / "out" / "marker")
    with pytest.raises(FormatError, match="contains the input"):
        check_output(tmp_path / "out", inputs=[tmp_path / "input"], force=True)


@pytest.mark.parametrize("name", ["gs://bucket/out", "s3://bucket/out", "file:///out", "hdfs:/out"])
def test_a_bucket_is_not_taken_for_a_local_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="no local folder"):
        write(name)
    with pytest.raises(FormatError, match="no local folder"), atomic.atomic_file(name, mark=MARK):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(FormatError, match="leads nowhere"):
        write(tmp_path / "out", force=True)


def write_file(file, content, error=None, **options):
    with atomic.atomic_file(file, mark=MARK, **options) as new:
        new.write_bytes(content)
        if error:
            raise error


def test_a_file_appears_whole_and_replaces_only_its_like(tmp_path):
    file = tmp_path / "page"
    write_file(file, MARK + b"1")
    with pytest.raises(FormatError, match="already exists"):
        write_file(file, MARK + b"2")
    write_file(file, MARK + b"2", force=True)
    with pytest.raises(KeyboardInterrupt):
        write_file(file, b"half", KeyboardInterrupt(), force=True)
    assert tree(tmp_path) == {"page": "<mark>2"}
    file.write_text("mine")
    with pytest.raises(FormatError, match="did not write this file"):
        write_file(file, MARK, force=True)
    assert tree(tmp_path) == {"page": "mine"}


def test_no_link_that_others_have_laid_is_followed(tmp_path):
    """Nobody can foresee the name of the temporary file."""
    (tmp_path / "victim").write_text("mine")
    for name in (".page.new", ".page.tmp", "page.new"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_file(tmp_path / "page", MARK)
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "page").read_bytes() == MARK


def test_a_file_that_a_killed_run_has_left_is_tidied_up(tmp_path):
    (tmp_path / ".page.0123456789ab.new").write_text("half")
    write_file(tmp_path / "page", MARK)
    assert tree(tmp_path) == {"page": "<mark>"}


@pytest.mark.parametrize("name", ["folder", "input/page", "missing/page", "input"])
def test_files_that_may_not_be_written(tmp_path, name):
    for folder in ("folder", "input"):
        (tmp_path / folder).mkdir()
    with pytest.raises(FormatError):
        write_file(tmp_path / name, MARK, inputs=[tmp_path / "input"], force=True)
    assert tree(tmp_path) == {"folder": None, "input": None}


@pytest.mark.usefixtures("old")
def test_a_record_names_all_files(tmp_path):
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["files"].keys() == {"marker", "more/data"}
    assert record["kind"] == KIND


def test_a_link_stays_a_link(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "out") == {k[4:]: v for k, v in NEW.items() if k != "out"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_a_failure_while_writing_changes_nothing(tmp_path, error, force):
    if force:
        write(tmp_path / "out", "old")
    before = tree(tmp_path)
    with (
        pytest.raises(error),
        atomic_folder(tmp_path / "out", force=force) as new,
    ):
        fail(new, error)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("step", ["rename", "fsync"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(6))
def test_an_interrupt_at_any_step_leaves_the_old_or_the_new(
    tmp_path, old, monkeypatch, step, after, call
):
    """Whole, and nothing beside it, whether the interrupt comes before or after the step."""
    owner, name = (os, "fsync") if step == "fsync" else (type(tmp_path), "rename")
    original, calls = getattr(owner, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) - 1 != call:
            return original(*args)
        if after:
            original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        write(tmp_path / "out", force=True)
    monkeypatch.undo()
    assert tree(tmp_path) in (old, NEW)


def test_check_output_makes_nothing(tmp_path):
    assert check_output(tmp_path / "a" / "out") == tmp_path / "a" / "out"
    assert tree(tmp_path) == {}


def test_a_full_disk_changes_nothing(small_disk):
    write(small_disk / "out", "old")
    before = tree(small_disk)
    for name in ("out", "other"):
        with (
            pytest.raises(OSError, match="No space left"),
            atomic_folder(small_disk / name, force=True) as folder,
        ):
            (folder / "data").write_bytes(bytes(300_000))
        assert tree(small_disk) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_copy_onto_a_full_disk_names_the_output(tmp_path, number):
    def copy():
        with atomic_folder(tmp_path / "out") as folder:
            raise OSError(number, "No space left", "source", None, str(folder / "copy"))

    with pytest.raises(OSError, match="No space left") as caught:
        copy()
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "out"), None)


def test_a_read_only_disk_names_the_output(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("mkdir", "rename"):
        monkeypatch.setattr(type(tmp_path), name, refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        write(tmp_path / "out")
    assert caught.value.filename in (str(tmp_path / "out"), str(tmp_path))


def test_changes_of_a_folder_wait_for_each_other(tmp_path):
    """None of them is lost, though each replaces the folder by one with all it had, and more."""
    write(tmp_path / "out", "")
    names = [f"{i}" for i in range(16)]

    def add(name):
        with atomic.change_folder(tmp_path / "out"):
            known = (tmp_path / "out" / "marker").read_text()
            write(tmp_path / "out", f"{known} {name}", force=True)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, names))
    assert sorted((tmp_path / "out" / "marker").read_text().split(), key=int) == names
    with atomic.change_folder(tmp_path / "nothing"):
        pass
