"""The benchmark of rules runs, and has all of them. Nothing is timed here."""

import json

import pytest
import rules

from coremerge_jax.rules import RULES


def test_every_rule_is_measured():
    entries = rules.entries()
    assert set(RULES) < set(entries)
    assert set(rules.BASES) < set(entries)
    assert {entry.space_name for entry in entries.values()} == {"core", "tucker", "core, balanced"}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["task_arithmetic", "tsv"], marks=pytest.mark.nightly),
        pytest.param(
            ["task_arithmetic", "tsv", "regmean", "ties in tucker"],
            marks=pytest.mark.nightly,
        ),
    ],
    ids=len,
)
def test_a_table_is_written(tmp_path, capsys, names):
    options = [option for name in names for option in ("--rules", name)]
    assert rules.main(["--quick", "--repeat", "1", "--output", str(tmp_path), *options]) == 0
    result = json.loads((tmp_path / "rules.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == set(names)
    for name in names[1:]:
        row = rows[name]
        assert min(row["products"], row["core"], row["memory"], row["model"]) > 0
        assert row["times"]["compile"] >= 0
        assert set(row["over"]) == set(rules.BASES)
    assert rows["tsv"]["over"]["tsv"] == 1
    table = (tmp_path / "rules.md").read_text()
    for name in names:
        rule, _, space = name.partition(" in ")
        assert f"| {rule} | {space or 'core'} |" in table
    assert names[-1].partition(" in ")[0] in capsys.readouterr().out


def test_no_such_rule():
    with pytest.raises(SystemExit):
        rules.main(["--rules", "sum"])
