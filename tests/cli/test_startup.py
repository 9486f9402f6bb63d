"""Commands that do without JAX do not import it: neither waits for it, nor needs a device."""

import json
import subprocess
import sys

import pytest

from coremerge_jax import declared
from coremerge_jax.rules import RULES
from coremerge_jax.spaces import SPACES

# Runs the command line where an import of JAX is an error.
WITHOUT_JAX = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("jax", "jaxlib"), f"imports {name}"
sys.meta_path.insert(0, Refused())
from coremerge_jax.__main__ import main
main()
"""


def run(*args):
    """Runs `coremerge ARGS` in a process without JAX."""
    command = [sys.executable, "-c", WITHOUT_JAX, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--help"], 0, "Usage: "),
        (["--version"], 0, "coremerge "),
        (["merge", "--help"], 0, "--rule"),
        (["rules"], 0, "task_arithmetic"),
        (["rules", "--json"], 0, '"tucker"'),
        (["merge", "--ruel", "tsv"], 2, "No such option: --ruel"),
        (["merge", "a", "-o", "x"], 1, "a: no such folder"),
        (["inspect", "a"], 1, "a: no such folder"),
        (["inspect", "ADAPTER", "--modules"], 0, "base model: org/base"),
        (["inspect", "ADAPTER", "OTHER"], 0, "can be merged"),
        (["merge", "nowhere", "-o", "x", "--rule", "tvs"], 2, "did you mean 'tsv'?"),
        (["merge", "ADAPTER", "-o", "x", "--rule", "ties:density=x"], 2, "must be a number"),
        (["merge", "ADAPTER", "-o", "x", "--space", "croe"], 2, "did you mean 'core'?"),
    ],
)
def test_without_jax(adapters, args, code, message):
    names = {"ADAPTER": adapters[0], "OTHER": adapters[1]}
    result = run(*(names.get(arg, arg) for arg in args))
    assert message in result.stdout + result.stderr
    assert result.returncode == code


@pytest.mark.parametrize(
    "opened",
    [
        "import coremerge_jax as cm; adapter = cm.load_peft(folder)",
        "from coremerge_jax.io import open_peft; x = open_peft(folder); adapter = x.read(x)",
        "import coremerge_jax.io; adapter = coremerge_jax.io.load_peft(folder)",
    ],
)
def test_adapters_are_pytrees_however_they_are_opened(adapters, opened):
    lines = ["import sys", "folder = sys.argv[1]", opened, "import jax"]
    lines.append("print(len(jax.tree.leaves(adapter)))")
    command = [sys.executable, "-c", "\n".join(lines), adapters[0]]
    assert subprocess.check_output(command, text=True) == "6\n"


WITHOUT = """
import json, sys
from coremerge_jax import declared

found = {}
for what in ("rules", "spaces"):
    table = getattr(declared, what)()
    found[what] = [[name, x.description, x.defaults] for name, x in table.items()]
assert "jax" not in sys.modules
print(json.dumps(found))
"""


def test_declarations_are_those_of_the_classes():
    found = json.loads(subprocess.check_output([sys.executable, "-c", WITHOUT], text=True))
    for name, declarations, table in (
        ("rules", declared.rules(), RULES),
        ("spaces", declared.spaces(), SPACES),
    ):
        own = [[x, y.description, dict(y.defaults)] for x, y in declarations.items()]
        assert found[name] == own
        assert [x for x, _, _ in own] == list(table)
        assert all(description for _, description, _ in own)
