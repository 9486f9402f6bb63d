"""The terminal: names, errors, warnings and signals."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import coremerge_jax as cm
from coremerge_jax.cli.console import describe_paths, show
from coremerge_jax.diagnosis import plots
from coremerge_jax.errors import CoreMergeWarning
from coremerge_jax.io.card import model_card
from coremerge_jax.io.orbax.orbax_tree import _system_errors
from coremerge_jax.search import Sweep
from coremerge_jax.search.sweeping import Record
from coremerge_jax.text import json_escaped, printable, shortened

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
    ":x:",
]
ALL_HOSTILE = "".join(name.replace("\udc80", "") for name in HOSTILE)


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
        return cm.load_peft(path)

    path = save("math")
    monkeypatch.setattr("coremerge_jax.io.formats.open_adapter", warn)
    with warnings.catch_warnings(record=True, action="always") as shown:
        result = coremerge("inspect", path)
    assert result.code == 0
    assert result.err == "note: take care\n"
    assert [str(one.message) for one in shown] == ["mine"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x):\n    return x['no']\n", ["line 2, in f", "KeyError: 'no'"]),
        (
            "def f(x):\n    exit('a\\nb\\x1b')\n",
            ["line 2, in f", "SystemExit: a b\\x1b"],
        ),
        ("1 / 0\n", ["line 1", "ZeroDivisionError"]),
        ("def f(:\n", ["line 1", "SyntaxError"]),
    ],
)
def test_an_error_of_the_users_function_says_where(coremerge, adapters, tmp_path, code, expected):
    (tmp_path / "mine.py").write_text(code)
    options = ["--values", "scale=1,2", "--rule", "mean", "--evaluate", f"{tmp_path}/mine.py:f"]
    result = coremerge("sweep", *adapters, "-o", tmp_path / "out", *options)
    assert result.code == 1
    assert result.err.count("\n") == 1
    for text in ("mine.py:f", *expected):
        assert text in result.err


# --- The card and the page ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    ["/home/me/llama", "./llama", "~/llama", "a/b/c", "o/b\n---\nx: 1", "o/<b>", "C:\\m", "", None],
)
def test_the_front_matter_has_only_names_of_the_hub(base):
    text, content = model_card(base, {})
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    assert content["base_model"] == base


def test_the_card_shows_names_as_text():
    name = "<img src=x>|[a](http://b)`c`**d**\n# e\x1b$f$ ![g](h) https://i www.j __k__ l_m"
    sources = [{"name": name, "sha256": {name: name}}]
    recipe = {"rules": ["mean"], "scale": {"```\n# x": 1}}
    text, _ = model_card(name, {"dtype": name, "recipe": recipe, "sources": sources})
    cell = (
        r"&lt;img src=x&gt;\|\[a\](http:\//b)\`c\`\*\*d\*\*\\n# e\\x1b\$f\$ !\[g\](h) "
        r"https:\//i www\.j \_\_k\_\_ l_m"
    )
    assert text.count(cell) == 5
    assert "<img" not in text
    assert text.count("````") == 2
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["_a", "$x^2_{$", "漢字 😀", "a\nb\x1b<b>", "\udc80", "\\frac"])
def test_any_name_can_be_in_a_plot(name):
    names = [name, "b", "c"]
    svg = plots.pairs(names, np.eye(3)) + plots.bars(names, np.arange(3.0))
    assert svg.replace("\n", "").isprintable()
    assert "<b>" not in svg
    svg.encode()


@pytest.mark.parametrize("name", ["$x^2_{$", "漢字 😀", "a\x1bb", "_a"])
def test_any_name_can_be_in_the_plot_of_a_sweep(name, tmp_path):
    records = [Record(r, None, {name: v}, {name: 1.0}, 0.1) for r in (name, "b") for v in (1, 2)]
    Sweep(tuple(records), name).plot(tmp_path / "x.svg")
    assert printable(name) in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("scale", [plots.Scale("viridis"), plots.Scale("viridis", 0.0)])
def test_rounding_noise_gets_one_color(scale):
    values = 1.0 + 1e-9 * np.arange(6.0)
    low, high = plots._limits(values, scale)
    assert high - low >= 0.05
    assert low <= values.min() <= values.max() <= high


@pytest.mark.parametrize("scale", [plots.Scale("viridis"), plots.Scale("viridis", 0.0)])
def test_numbers_that_are_not_finite_do_not_stretch_a_color_scale(scale):
    finite = np.array([1.0, 2.0])
    values = np.array([1.0, np.inf, 2.0, -np.inf, np.nan])
    assert plots._limits(values, scale) == plots._limits(finite, scale)
    assert plots.around(1.5, values) == plots.around(1.5, finite)
    plots.bars(list("abcde"), values)  # no warning


def test_rounding_noise_is_a_line_in_the_plot_of_a_sweep():
    records = [Record("r", None, {"x": v}, {"s": 0.7 + v * 1e-15}, 0.1) for v in (1, 2, 3)]
    low, high = Sweep(tuple(records), "s").plot().axes[0].get_ylim()
    assert high - low > 1e-5


def test_the_table_and_csv_of_a_sweep_show_names_as_they_are(capsys):
    sweep = Sweep((Record(ALL_HOSTILE, None, {"p": 1}, {ALL_HOSTILE: 1.0}, 0.1),), ALL_HOSTILE)
    show(sweep.table())
    for text in (capsys.readouterr().out, sweep.to_csv()):
        assert text.replace("\n", "").isprintable()
        assert "[red]markup[/]" in text


# --- Disks ----------------------------------------------------------------------------------


def test_a_full_disk_is_one_error_of_orbax(tmp_path):
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        _system_errors(tmp_path),
    ):
        raise ValueError("a\n" * 200 + "RESOURCE_EXHAUSTED [OS error 28: No space left on device]")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="else"), _system_errors(tmp_path):
        raise ValueError("else")


# --- As real processes ------------------------------------------------------------------------

# Whoever runs the tests may have them ignore signals, as `nohup` does, or a shell's background.
DEFAULT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
"""
# Says where it is once it has made its temporary folder, and tidies up slowly.
SLOW = """
import sys, time
from coremerge_jax.__main__ import main
from coremerge_jax import cli
from coremerge_jax.cli import signals
signals._PATIENCE = 60
def command():
    try:
        print("here", flush=True)
        for _ in range(600):  # a signal just before one sleep does not shorten it
            time.sleep(0.1)
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
        # Not `communicate`, which does not see what a line's read has taken already.
        out, err = process.stdout.read(), process.stderr.read()
    assert out == "tidy\n"
    assert process.returncode == 128 + number
    assert err == ("interrupted\n" if number == signal.SIGINT else "")


# Imports a module that takes a while; and leaves a thread that nobody ends.
IMPORTING = """
import sys, threading
from coremerge_jax.__main__ import main
from coremerge_jax import cli
def command():
    threading.Thread(target=threading.Event().wait).start()
    try:
        import slow_module
        threading.Event().wait(60)
    finally:
        print("tidy", flush=True)
cli.app.command("wait")(command)
main()
"""
MODULE = """
import time
print("here", flush=True)
try:
    for _ in range(5):
        time.sleep(0.1)
except BaseException:
    print("an extension module would crash", flush=True)
print("imported", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_an_import_and_for_no_thread(number, tmp_path):
    (tmp_path / "slow_module.py").write_text(MODULE)
    with start(f"import sys; sys.path.append({str(tmp_path)!r})\n" + IMPORTING, "wait") as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.stdout.read() == "imported\ntidy\n"
        assert process.stderr.read() == ("interrupted\n" if number == signal.SIGINT else "")
    assert process.returncode == 128 + number


# Python cannot raise an exception in a finalizer.
FINALIZER = """
import os, time
from coremerge_jax.__main__ import main
from coremerge_jax import cli
class Last:
    def __del__(self):
        os.kill(os.getpid(), NUMBER)
        time.sleep(0)
def command():
    Last()
    time.sleep(60)
    print("forgotten", flush=True)
cli.app.command("wait")(command)
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_finalizer_is_not_forgotten(number):
    with start(f"NUMBER = {int(number)}\n" + FINALIZER, "wait") as process:
        out, err = process.communicate(timeout=60)
    assert not out
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
    # As `main` does first; else a busy machine has the signal come before.
    early = "from coremerge_jax import __main__\nsignal.signal(signal.SIGINT, __main__._leave)"
    code = f"{early}\nprint('here', flush=True)\n__main__.main()"
    with start(code, "inspect", "nothing") as process:
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in [
        (130, "interrupted\n"),
        (1, "error: nothing: no such folder\n"),
        # The signal came while Python was shutting down, when no handler is left.
        (-signal.SIGINT, "error: nothing: no such folder\n"),
    ]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_ignored_interrupt_stays_ignored():
    code = SLOW.replace("range(600)", "range(5)")
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    with start(ignored + code, "wait") as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "tidying\ntidy\n"
        assert process.stderr.read() == ""
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


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["layers.0.q", "layers.1.q", "layers.0.v"], "3: q, v"),
        (["attn.to_out.0", "ff.net.0.proj", "ff.net.2"], "3: to_out.0, proj, net.2"),
        (["experts.down_proj[0]", "experts.down_proj[1]"], "2: down_proj"),
        (["a", "b", "c", "d", "e"], "5: a, b, c, d, …"),
    ],
)
def test_modules_are_named_by_the_last_part_that_is_no_number(paths, shown):
    assert describe_paths(paths) == shown


def _in_another_environment(*args, **variables):
    command = [sys.executable, "-m", "coremerge_jax", *map(str, args)]
    environment = {x: y for x, y in os.environ.items() if variables.get(x, y) is not None}
    environment |= {x: y for x, y in variables.items() if y is not None}
    return subprocess.run(command, capture_output=True, env=environment, check=False)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "value"), [("JAX_PLATFORMS", "nonsense"), ("JAX_ENABLE_X64", "maybe")]
)
def test_variables_that_jax_cannot_read_are_named(adapters, tmp_path, name, value):
    result = _in_another_environment("merge", *adapters, "-o", tmp_path / "x", **{name: value})
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: JAX cannot start (")
    assert f"{name}={value}" in result.stderr.decode()
    assert result.stderr.count(b"\n") == 1


@pytest.mark.wide
def test_json_is_read_whatever_the_encoding_of_the_terminal(save):
    result = _in_another_environment("inspect", save("Δ语"), "--json", PYTHONIOENCODING="cp1252")
    assert json.loads(result.stdout)["adapters"][0]["name"] == "Δ语"


@pytest.mark.wide
def test_help_on_a_terminal_without_columns():
    assert b"--rule" in _in_another_environment("merge", "--help", COLUMNS="0").stdout


def test_without_a_home_folder_programs_are_not_kept(coremerge, adapters, tmp_path, monkeypatch):
    def none(*_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_cache_path", none)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert coremerge("merge", *adapters, "-o", tmp_path / "out").code == 0
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
