"""The outcome of every command that writes, for every relation of its output to what is there.

``DONE`` stands for exit code 0. Anything else is refused in one line, and changes nothing.
"""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

import coremerge_jax as cm
from coremerge_jax.io.orbax.orbax_adapter import save_orbax

MODULES = {"layer.0.query": (6, 8)}

DONE = "done"
INPUT = "the input"
EXISTS = "already exists"
FOREIGN = "not replaced"
OTHER = "choose another output"

# Relation of the output to what is there, and the outcome without and with --force.
FOLDERS = {
    "new": (DONE, DONE),
    "new, in folders that are missing": (DONE, DONE),
    "an input": (INPUT, INPUT),
    "inside an input": (INPUT, INPUT),
    "around the inputs": (INPUT, INPUT),
    "a link to an input": (INPUT, INPUT),
    "a link that leads nowhere": ("leads nowhere", "leads nowhere"),
    "a bucket": ("no local folder", "no local folder"),
    "a file": ("not a folder", "not a folder"),
    "an empty folder": (EXISTS, DONE),
    "a folder of another program": (EXISTS, FOREIGN),
    "a run of a trainer": (EXISTS, FOREIGN),
    "its own older output": (EXISTS, DONE),
    "a link to its own older output": (EXISTS, DONE),
    "its own older output with a file more": (EXISTS, FOREIGN),
    "its own older output, trained further": (EXISTS, FOREIGN),
}
# A sweep goes on in its own folder, and has no --force.
SWEEPS = {
    **{name: without for name, (without, _) in FOLDERS.items()},
    "an empty folder": DONE,
    "a folder of another program": OTHER,
    "a run of a trainer": OTHER,
    "its own older output": DONE,
    "a link to its own older output": DONE,
    "its own older output with a file more": DONE,
    "its own older output, trained further": None,
}
FILES = {
    "new": (DONE, DONE),
    "new, in folders that are missing": ("no such folder", "no such folder"),
    "an input": ("is a folder", "is a folder"),
    "inside an input": (INPUT, INPUT),
    "a link to an input": ("is a folder", "is a folder"),
    "a link that leads nowhere": ("not a file", "not a file"),
    "a bucket": ("no local folder", "no local folder"),
    "a file": (EXISTS, FOREIGN),
    "a link to a file": (EXISTS, FOREIGN),
    "its own older output": (EXISTS, DONE),
    "a link to its own older output": (EXISTS, DONE),
}


@pytest.fixture
def inputs(save, tmp_path, monkeypatch):
    """Adapters and base models of every kind; the folder that a command works in."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        save(f"in/{name}", modules=MODULES)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 8)).astype(np.float32)
    save_orbax(cm.load_peft(tmp_path / "in/a"), tmp_path / "in/checkpoint")
    (tmp_path / "in/base").mkdir()
    (tmp_path / "in/base/config.json").write_text(
        '{"architectures": ["XModel"], "vocab_size": 100, "tie_word_embeddings": false}'
    )
    save_file({"layer.0.query.weight": weight}, tmp_path / "in/base/model.safetensors")
    tree = {"layer_0": {"query": {"kernel": jnp.asarray(weight.T)}}}
    ocp.save(tmp_path / "in/tree", tree)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TO_ORBAX = ("convert", "in/a", "--to", "orbax")
# A command, and one of its inputs.
COMMANDS = {
    "merge": (("merge", "in/a", "in/b", "--rule", "mean"), "in/b"),
    "convert to peft": (("convert", "in/a"), "in/a"),
    "convert to orbax": (TO_ORBAX, "in/a"),
    "apply": (("apply", "in/a", "--base", "in/base"), "in/base"),
    "apply to a tree": (("apply", "in/a", "--base", "in/tree"), "in/tree"),
}
# The same commands with inputs of other kinds.
INPUTS = {
    "convert from orbax": (("convert", "in/checkpoint"), "in/checkpoint"),
    "convert like": ((*TO_ORBAX, "--like", "in/checkpoint"), "in/checkpoint"),
    "apply of an adapter": (("apply", "in/a", "--base", "in/base"), "in/a"),
}
SWEEP = ("sweep", "in/a", "in/b", "--rule", "mean", "--values", "scale=0.5,1")
REPORT = ("report", "in/a", "in/b")


def arrange(relation, out, source, write_older):
    """Makes what a relation speaks of; gives the output to ask for."""
    link = out.with_name("link")
    if relation == "new, in folders that are missing":
        return out / "x" / "y"
    if relation == "an input":
        return source
    if relation == "inside an input":
        return source / "x"
    if relation == "around the inputs":
        return source.parent
    if relation == "a link to an input":
        link.symlink_to(source)
        return link
    if relation == "a link that leads nowhere":
        link.symlink_to(link)
        return link
    if relation == "a bucket":
        return "gs://bucket/out"
    if relation == "a file":
        out.write_text("mine")
    if relation == "a link to a file":
        out.write_text("mine")
        link.symlink_to(out)
        return link
    if relation == "an empty folder":
        out.mkdir()
    if relation == "a folder of another program":
        out.mkdir()
        for name in ("adapter_config.json", "config.json", "_CHECKPOINT_METADATA", "thesis.tex"):
            (out / name).write_text("{}")
    if relation == "a run of a trainer":
        cm.save_peft(cm.load_peft(source.parent / "a"), out)
        (out / "coremerge.json").unlink()
        (out / "checkpoint-500").mkdir()
        (out / "checkpoint-500" / "optimizer.pt").write_text("state")
    if "its own older output" in relation:
        write_older(out)
    if relation == "a link to its own older output":
        link.symlink_to(out)
        return link
    if relation == "its own older output with a file more":
        (out / "notes.txt").write_text("mine")
    if relation == "its own older output, trained further":
        largest = max((x for x in out.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
        largest.write_bytes(largest.read_bytes()[::-1])
    return out


def snapshot(folder):
    """All that is in a folder: links, and hashes of files."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def check(coremerge, folder, command, out, outcome, *options):
    before = snapshot(folder)
    result = coremerge(*command, "-o", out, *options)
    after = snapshot(folder)
    if outcome == DONE:
        assert (result.code, result.err) == (0, "")
        changed = {name for name in before if before[name] != after.get(name)}
        assert not {name for name in changed if name.startswith("in/")}
    else:
        assert result.code in (1, 2)
        assert result.err.count("\n") == 1
        assert outcome in result.err
        assert after == before
    assert not [name for name in after if name.endswith((".new", ".old"))]


CASES = {
    **{f"{name}, {r}": (*COMMANDS[name], r) for name in COMMANDS for r in FOLDERS},
    **{f"{name}, {r}": (*INPUTS[name], r) for name in INPUTS for r in FOLDERS if "input" in r},
}


@pytest.mark.parametrize(("command", "source", "relation"), CASES.values(), ids=CASES.keys())
def test_a_folder_is_written_only_where_nothing_is_lost(
    coremerge, inputs, command, source, relation
):
    older = lambda out: coremerge(*command, "-o", out)  # noqa: E731
    out = arrange(relation, inputs / "out", inputs / source, older)
    without, forced = FOLDERS[relation]
    check(coremerge, inputs, command, out, without)
    if without != DONE:
        check(coremerge, inputs, command, out, forced, "--force")


@pytest.mark.parametrize("relation", [name for name, outcome in SWEEPS.items() if outcome])
def test_a_sweep_is_written_only_where_nothing_is_lost(coremerge, inputs, relation):
    older = lambda out: coremerge(*SWEEP, "-o", out)  # noqa: E731
    out = arrange(relation, inputs / "out", inputs / "in/a", older)
    check(coremerge, inputs, SWEEP, out, SWEEPS[relation])


def test_a_sweep_keeps_an_adapter_called_best_that_is_not_its_own(coremerge, inputs):
    assert coremerge(*SWEEP, "-o", "out").code == 0
    cm.save_peft(cm.load_peft("in/a"), "out/best")
    (inputs / "out/best/coremerge.json").unlink()
    check(coremerge, inputs, SWEEP, "out", FOREIGN)


def test_a_sweep_does_not_write_through_links(coremerge, inputs):
    (inputs / "out").mkdir()
    (inputs / "victim").write_text("")
    (inputs / "out/sweep.jsonl").symlink_to(inputs / "victim")
    check(coremerge, inputs, SWEEP, "out", "symbolic link")


@pytest.mark.parametrize("relation", FILES)
def test_a_report_is_written_only_where_nothing_is_lost(coremerge, inputs, relation):
    older = lambda out: coremerge(*REPORT, "-o", out)  # noqa: E731
    out = arrange(relation, inputs / "out", inputs / "in/a", older)
    without, forced = FILES[relation]
    check(coremerge, inputs, REPORT, out, without)
    if without != DONE:
        check(coremerge, inputs, REPORT, out, forced, "--force")


def test_the_log_of_a_sweep_is_not_made_of_another_file(tmp_path):
    log = tmp_path / "notes"
    adapters = [cm.Adapter({"q": cm.LoRA(a=np.ones((1, 2)), b=np.ones((2, 1)))})]
    for text in ("one line without an end", "{}", '{"sweep": {}}\n{"rule', "a\nb\n"):
        log.write_text(text)
        with pytest.raises(cm.CoreMergeError, match="notes"):
            cm.search.sweep(adapters, cm.mean(), lambda _: 0.0, {"scale": [1.0]}, log=log)
        assert log.read_text() == text


def test_tables_and_figures_replace_only_their_like(tmp_path):
    adapters = [cm.Adapter({"q": cm.LoRA(a=np.ones((1, 2)), b=np.ones((2, 1)))})]
    found = cm.search.sweep(adapters, cm.mean(), lambda _: 0.0, {"scale": [1.0, 2.0]})
    for write, name in ((found.to_csv, "x.csv"), (found.plot, "x.svg"), (found.plot, "x.png")):
        file = tmp_path / name
        write(file)
        first = file.read_bytes()
        write(file)
        assert file.read_bytes() == first
        file.write_text("mine")
        with pytest.raises(cm.FormatError, match="did not write this file"):
            write(file)
        assert file.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_base_with_links_to_folders(coremerge, inputs):
    base = inputs / "in/base"
    (base / "self").symlink_to(base)
    (base / "devices").symlink_to("/dev")
    (base / "tokenizer.json").symlink_to(inputs / "in/a/adapter_config.json")
    result = coremerge("apply", "in/a", "--base", "in/base", "-o", "out", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["skipped"] == ["devices/ (a link)", "self/ (a link)"]
    names = {path.name for path in (inputs / "out").rglob("*")}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "coremerge.json"}
