"""The report: written at any moment of a run, self-contained, with the figures of report.json."""

import json

import pytest
import yaml

from ldo import report
from ldo.config import Recipe, to_dict
from ldo.report.__main__ import main
from ldo.report.charts import line_chart, smooth


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "trial"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(to_dict(Recipe(name="trial"))))
    return run


def interval(mean, spread=0.02):
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def summary(ldo_rate, spread=0.02):
    def metrics(rate):
        return {"violation_rate": interval(rate), "motion_ratio": interval(1.0), "reward_skill": interval(0.5)}

    return {
        "metrics": {"base": metrics(0.4), "ldo": metrics(ldo_rate)},
        "paired": {"ldo": {"violation_rate": interval(ldo_rate - 0.4, spread)}},
        "n_videos": {"base": 8, "ldo": 8},
        "at_rest": {"base": 0.1, "ldo": 0.1},
    }


def test_a_run_that_has_only_begun(folder):
    page = report.write(folder).read_text()
    assert "has not come to its evaluation yet" in page
    found = json.loads((folder / "report.json").read_text())
    assert found["stages"] == [] and found["gate"] is None and found["config"]["name"] == "trial"


def test_curves_of_a_run_that_goes_on(folder):
    lines = [{"step": i, "reward_skill": i / 10, "motion_ratio": 1.0, "kl": 0.0} for i in range(12)]
    (folder / "reinforce.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "rewa')  # killed while writing
    page = report.write(folder).read_text()
    assert "Stage 2: skill reward" in page and "Stage 1" not in page


@pytest.mark.parametrize(("rate", "words"), [(0.2, "fewer"), (0.6, "more"), (0.39, "no effect is shown")])
def test_verdict_says_what_the_interval_says(folder, rate, words):
    (folder / "eval").mkdir()
    (folder / "eval" / "summary.json").write_text(json.dumps(summary(rate)))
    page = report.write(folder).read_text()
    assert words in page.split("<h2>")[0] and f"{rate:.1%}" in page
    stages = json.loads((folder / "report.json").read_text())["stages"]
    assert [(s["name"], s["steps"]) for s in stages] == [("base", 0), ("ldo", Recipe().align.steps + Recipe().rl.updates)]
    assert stages[1]["metrics"]["violation_rate"]["mean"] == rate


def test_verdict_names_what_else_moved(folder):
    (folder / "eval").mkdir()
    found = summary(0.39)
    found["metrics"]["base"] |= {"existence": interval(0.6), "law_residual": interval(1.0)}
    found["metrics"]["ldo"] |= {"existence": interval(0.8), "law_residual": interval(1.01)}
    found["paired"]["ldo"] |= {"existence": interval(0.2), "law_residual": interval(0.01)}
    (folder / "eval" / "summary.json").write_text(json.dumps(found))
    head, _, rest = report.write(folder).read_text().partition("<h2>")
    assert "existence <b class='good'>+0.200</b> [+0.180, +0.220]" in head and "law residual" not in head
    assert "<small class='good'>+0.200 [+0.180, +0.220]</small>" in rest and "<small class=''>+0.010 [-0.010, +0.030]</small>" in rest
    found["paired"]["ldo"] |= {"existence": interval(-0.2), "law_residual": interval(-0.2)}
    (folder / "eval" / "summary.json").write_text(json.dumps(found))
    head = report.write(folder).read_text().partition("<h2>")[0]
    assert "existence <b class='bad'>-0.200</b>" in head and "law residual <b class='good'>-0.200</b>" in head


def test_page_escapes_what_comes_from_outside(folder):
    config = yaml.safe_load((folder / "recipe.yaml").read_text())
    config["model"]["path"] = "<script>x</script>"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert "<script>x" not in report.write(folder).read_text()


def test_command(folder, capsys):
    assert main([str(folder)]) == 0 and str(folder / "report.html") in capsys.readouterr().out
    assert main([str(folder / "missing")]) == 2 and "is not the folder of a run" in capsys.readouterr().err


def test_charts():
    assert line_chart("x", {"a": []}) == ""
    drawn = line_chart("a < b", {"one": [(0, 1.0), (1, 2.0)], "two": [(0, 3.0)]})
    assert drawn.count("<polyline") == 2 and "a &lt; b" in drawn and "one" in drawn
    assert smooth([(0, 0.0), (1, 2.0), (2, 4.0)], 2) == [(0, 0.0), (1, 1.0), (2, 3.0)]
