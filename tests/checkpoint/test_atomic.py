import contextlib
import os

import pytest

from coremerge_jax.checkpoint.atomic import atomic_folder, check_output
from coremerge_jax.errors import FormatError

MARKER = "marker"


def write(out, content="new", **options):
    with atomic_folder(out, markers=(MARKER,), **options) as folder:
        (folder / MARKER).write_text(content)
        (folder / "more").mkdir()
        (folder / "more" / "data").write_text(content * 100)


def fail(folder, error):
    (folder / MARKER).write_text("half")
    raise error


def tree(folder):
    """All that is in a folder, hidden names included."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
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
        atomic_folder(tmp_path / "c" / "d" / "out", markers=(MARKER,)),
    ):
        raise RuntimeError
    assert not (tmp_path / "c").exists()


def test_what_a_killed_run_has_left_is_tidied_up(tmp_path):
    new, aside = tmp_path / ".out.shared.new", tmp_path / ".out.shared.old"
    write(new, "half")
    write(tmp_path / "out", label="shared", force=True)
    assert tree(tmp_path) == NEW
    # Killed between the two renames: what was there is in no other place.
    (tmp_path / "out").rename(aside)
    with pytest.raises(FormatError, match="already exists"):
        write(tmp_path / "out", label="shared")
    assert tree(tmp_path) == NEW
    write(aside, "old")
    write(tmp_path / "out", label="shared", force=True)
    assert tree(tmp_path) == NEW


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
    for name, message in (("out", "has no marker"), ("file", "not a folder")):
        with pytest.raises(FormatError, match=message):
            write(tmp_path / name, force=True)
    assert tree(tmp_path) == {"out": None, "out/thesis": "", "file": ""}
    (tmp_path / "out" / "thesis").unlink()
    (tmp_path / "file").unlink()
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == NEW


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
        atomic_folder(tmp_path / "out", markers=(MARKER,), force=force) as new,
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
    assert check_output(tmp_path / "a" / "out", markers=(MARKER,)) == tmp_path / "a" / "out"
    assert tree(tmp_path) == {}


def test_a_full_disk_changes_nothing(small_disk):
    write(small_disk / "out", "old")
    before = tree(small_disk)
    for name in ("out", "other"):
        with (
            pytest.raises(OSError, match="No space left"),
            atomic_folder(small_disk / name, markers=(MARKER,), force=True) as folder,
        ):
            (folder / "data").write_bytes(bytes(300_000))
        assert tree(small_disk) == before
