"""What reaches the terminal, and what signals do to a command."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeWarning
from coremerge_jax.foreign_text import json_escaped, printable, shortened

HOSTILE = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x1b\\link",
    "\x9b2J",
    "a\rb",
    "a\x08b",
    "line\nforged",
    "\u202egnp.exe",
    "\u200bzero",
    "\u2028separator",
    "[red]markup[/]",
    "[link=http://x]y[/link]",
    ":warning:",
]


def assert_harmless(text):
    assert printable(text.replace("\n", "")) == text.replace("\n", "")


@given(text=st.text(st.characters(codec=None)))
def test_what_is_shown_cannot_steer_a_terminal_and_can_be_written(text):
    shown = printable(text)
    assert shown.isprintable() or "\u3000" in shown or " " in shown
    assert printable(shown) == shown
    shown.encode()
    assert printable("Δ 语 é‘") == "Δ 语 é‘"
    document = json.dumps({text: text}, ensure_ascii=False)
    assert json.loads(json_escaped(document)) == {text: text}
    json_escaped(document).encode()


@given(text=st.text(max_size=40), length=st.integers(10, 30))
def test_a_long_text_keeps_its_ends(text, length):
    short = shortened(text, length)
    assert len(short) <= length
    assert short == text if len(text) <= length else short[:2] + short[-2:] == text[:2] + text[-2:]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_steer_the_terminal(coremerge, save, tmp_path, name):
    folder = save("math", modules={name.replace(".", "_"): (6, 8)}, base_model=name)
    hostile = tmp_path / name.replace("/", "_")
    folder.rename(hostile)
    shown = [
        coremerge("inspect", hostile, "--modules"),
        coremerge("inspect", hostile, hostile, "--json"),
        coremerge("inspect", tmp_path / f"missing{name}"),
        coremerge("merge", hostile, "--rule", name, "-o", "x"),
        coremerge("merge", hostile, "--dry-run", "-o", tmp_path / "x", "--scale", f"{name}=1"),
        coremerge(name),
        coremerge("inspect", f"--{name}"),
    ]
    for result in shown:
        assert_harmless(result.out)
        assert_harmless(result.err)
        assert result.err.count("\n") <= 1
    if "[" in name:  # markup is shown as it is
        assert "[" in shown[0].out


def test_a_long_name_does_not_fill_the_screen(coremerge):
    result = coremerge("inspect", "x" * 100_000)
    assert result.code == 1
    assert len(result.err) < 5000


def test_warnings_of_libraries_stay_inside_and_ours_are_notes(coremerge, monkeypatch, save):
    def warn(_):
        warnings.warn_explicit("theirs", RuntimeWarning, os.__file__, 1)
        warnings.warn_explicit("mine", UserWarning, "/home/me/judge.py", 7)
        warnings.warn("take\ncare", CoreMergeWarning, stacklevel=1)
        return cm.load_peft(save("math"))

    monkeypatch.setattr("coremerge_jax.checkpoint.open_adapter", warn)
    with warnings.catch_warnings(record=True, action="always") as shown:
        result = coremerge("inspect", "x")
    assert result.code == 0
    assert result.err == "note: take care\n"
    assert [str(one.message) for one in shown] == ["mine"]


JUDGES = {
    "raise KeyError('accuracy')": "KeyError: 'accuracy'",
    "return 1 / 0": "ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("body", JUDGES)
def test_an_error_of_the_users_function_names_its_line(coremerge, adapters, tmp_path, body):
    file = tmp_path / "task.py"
    file.write_text(f"def judge(adapter):\n    {body}\n")
    args = ("--rule", "mean", "--values", "scale=1", "--evaluate", f"{file}:judge")
    result = coremerge("sweep", *adapters, "-o", tmp_path / "out", *args)
    assert result.code == 2
    assert result.err.count("\n") == 1
    for part in (JUDGES[body], "task.py, line 2", "'judge'"):
        assert part in result.err


@pytest.mark.parametrize("text", ["def judge(:", "import nothing_of_this_name", "1 / 0"])
def test_an_error_of_the_users_file_is_one_line(coremerge, adapters, tmp_path, text):
    (tmp_path / "task.py").write_text(text)
    args = ("--values", "scale=1", "--evaluate", f"{tmp_path / 'task.py'}:judge")
    result = coremerge("sweep", *adapters, "-o", tmp_path / "out", *args)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "task.py" in result.err


# --- As real processes ------------------------------------------------------------------------

DEFAULT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# Says where it is once it has made its temporary folder, and tidies up slowly.
SLOW = """
import sys, time
from coremerge_jax.__main__ import main
from coremerge_jax import cli
def command():
    try:
        print("here", flush=True)
        time.sleep(60)
    finally:
        print("tidying", flush=True)
        time.sleep(0.5)
        print("tidy", flush=True)
cli.app.command("wait")(command)
main()
"""
AT_END = """
import atexit, sys, time
from coremerge_jax.__main__ import main
atexit.register(lambda: (print("here", flush=True), time.sleep(60)))
main()
"""


def start(code, *args):
    command = [sys.executable, "-c", DEFAULT + code, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_tidies_up_however_often_it_is_told_to_end(number):
    with start(SLOW, "wait") as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.stdout.readline() == "tidying\n"
        for again in (number, signal.SIGINT, signal.SIGTERM):
            process.send_signal(again)
        out, err = process.communicate(timeout=60)
    assert out == "tidy\n"
    assert process.returncode == 128 + number
    assert err == ("interrupted\n" if number == signal.SIGINT else "")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_signal_while_the_interpreter_ends_is_silent():
    with start(AT_END, "--version") as process:
        assert process.stdout.readline().startswith("coremerge ")
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("delay", [0.1, 0.2, 0.35])
def test_an_early_interrupt_is_one_line(delay):
    code = "print('here', flush=True)\nfrom coremerge_jax.__main__ import main\nmain()"
    with start(f"import coremerge_jax\n{code}", "inspect", "nothing") as process:
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in [
        (130, "interrupted\n"),
        (1, "error: nothing: no such folder\n"),
    ]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_ignored_interrupt_stays_ignored():
    code = SLOW.replace("sleep(60)", "sleep(0.5)")
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    with start(ignored + code, "wait") as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("tidying\ntidy\n", "")
    assert process.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{} rules | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}", None),
        ("{} --version >&-", 0),
        ("{} merge a 2>&-", 2),
        ("LANG=C PYTHONIOENCODING=ascii {} rules > /dev/null", 0),
        ("COLUMNS=x TERM=odd {} --help > /dev/null", 0),
    ],
)
def test_odd_terminals(line, code):
    command = line.format(f"{sys.executable} -m coremerge_jax")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert code is None or done.returncode == code


def test_a_program_with_jax_may_start_the_command_quietly(coremerge, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")  # as JAX sets it
    assert coremerge("--version").code == 0
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
