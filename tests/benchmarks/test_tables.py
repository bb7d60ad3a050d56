"""The tables of the docs agree with the committed results, and are filled from them."""

import json
import shutil

import pytest

from benchmarks import tables
from benchmarks.lease import ROOT


def test_the_docs_agree_with_the_results():
    assert tables.main(["--check"]) == 0


@pytest.fixture
def project(tmp_path):
    """A project with one document and one run, whose residual took 2 ms."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("No table here.\n")
    (tmp_path / "docs" / "kernels.md").write_text(f"Before.\n<!-- table: residual -->\nold\n{tables.END}\nAfter.\n")
    write(tmp_path, "2026-01-01-aaaaaaa", triton=2.0, compile=3.0)
    return tmp_path


def write(project, run, **ms):
    folder = project / "benchmarks" / "results" / "nvidia-x" / run
    folder.mkdir(parents=True, exist_ok=True)
    common_fields = {
        "op": "residual",
        "case": "cosine/windows",
        "pass": "fwd",
        "shape": {"B": 1, "M": 1000, "D": 500},
        "dtype": "bf16",
    }
    rows = [
        {**common_fields, "variant": variant, "ms": milliseconds, "grad_error": None}
        for variant, milliseconds in ms.items()
    ]
    (folder / "residual.json").write_text(json.dumps({"copy_gbps": 1.0, "rows": rows}))


def run(project, *flags):
    return tables.main([*flags, "--root", str(project)])


def test_a_table_is_filled_and_then_right(project, capsys):
    assert (
        run(project, "--check") == 1
        and "docs/kernels.md: the table residual differs from the results" in capsys.readouterr().out
    )
    assert run(project) == 0 and run(project, "--check") == 0
    text = (project / "docs" / "kernels.md").read_text()
    assert text.startswith("Before.\n<!-- table: residual -->\n|") and text.endswith(f"|\n{tables.END}\nAfter.\n")
    # 2 MB in 2 ms, at 1 GB/s
    assert "| cosine/windows, 1,000 x 500, fwd | 2.000 | 1.00 | 1.50 | – | – | 2026-01-01-aaaaaaa |" in text


def test_runs_have_a_row_each_and_what_is_missing_is_a_dash(project):
    write(project, "2026-02-01-bbbbbbb", triton=1.0)
    run(project)
    rows = [line for line in (project / "docs" / "kernels.md").read_text().splitlines() if line.startswith("| cosine")]
    assert [row.split(" | ")[1] for row in rows] == ["2.000", "1.000"]
    assert rows[1].endswith("| 2.00 | – | – | – | 2026-02-01-bbbbbbb |")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- table: nonsense -->\n<!-- end of table -->\n",
            "README.md: there is no table nonsense; one of headline, ",
        ),
        ("<!-- table: residual -->\nand no end\n", "README.md: the table residual has no <!-- end of table -->"),
        (
            "<!-- table: residual -->\n<!-- table: goals -->\n<!-- end of table -->\n",
            "README.md: the table residual has no <!-- end",
        ),
    ],
)
def test_a_broken_document_is_reported_in_one_line(project, text, message, capsys):
    (project / "README.md").write_text(text)
    assert run(project) == 2
    message_shown = capsys.readouterr().err
    assert message in message_shown and message_shown.count("\n") == 1 and (project / "README.md").read_text() == text


def test_a_changed_result_is_noticed(tmp_path):
    for copied in ("README.md", "docs", "benchmarks/results"):
        source = ROOT / copied
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / copied)
    assert run(tmp_path, "--check") == 0
    path = next((tmp_path / "benchmarks" / "results").glob("nvidia-*/*/recipe.json"))
    result = json.loads(path.read_text())
    for row in result["rows"]:
        # as if the file were edited and the tables were not filled again
        row["ms"] *= 1.5
    path.write_text(json.dumps(result))
    assert run(tmp_path, "--check") == 1


def test_an_odd_run_costs_only_its_row(project, capsys):
    # without ours
    write(project, "2026-02-01-bbbbbbb", compile=1.0)
    assert run(project) == 0 and "2026-02-01" not in (project / "docs" / "kernels.md").read_text()
    (project / "benchmarks" / "results" / "nvidia-x" / "2026-02-01-bbbbbbb" / "residual.json").write_text('{"rows": [')
    assert run(project) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_of_two_devices_are_by_date_and_say_which(project):
    folder = project / "benchmarks" / "results" / "nvidia-a" / "2026-02-01-bbbbbbb"
    shutil.copytree(project / "benchmarks" / "results" / "nvidia-x" / "2026-01-01-aaaaaaa", folder)
    labels = [each.label for each in tables.read_runs(project / "benchmarks" / "results")]
    assert labels == ["nvidia-x 2026-01-01-aaaaaaa", "nvidia-a 2026-02-01-bbbbbbb"]


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_made_of_nothing_and_of_all(name):
    assert tables.TABLES[name]([]).startswith("|")
    assert tables.TABLES[name](tables.read_runs()).count("\n") > 1
