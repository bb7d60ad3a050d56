"""The report: written at any moment of a run, self-contained, with the metrics of report.json."""

import json

import pytest
import yaml

from ldo.core.config import Recipe, to_plain
from ldo.report.__main__ import main
from ldo.report.charts import line_chart, smooth
from ldo.report.run_report import write_report


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "trial"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(to_plain(Recipe(name="trial"))))
    return run


def interval(mean, spread=0.02):
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def summary(ldo_rate, spread=0.02, rate="visible_violation_rate"):
    def metrics(mean):
        return {rate: interval(mean), "motion_ratio": interval(1.0), "reward_skill": interval(0.5)}

    return {
        "metrics": {"base": metrics(0.4), "ldo": metrics(ldo_rate)},
        "paired": {"ldo": {rate: interval(ldo_rate - 0.4, spread)}},
        "n_videos": {"base": 8, "ldo": 8},
        "at_rest": {"base": 0.1, "ldo": 0.1},
    }


def test_a_run_that_has_just_begun(folder):
    html = write_report(folder).read_text()
    assert "has not reached its evaluation yet" in html
    contents = json.loads((folder / "report.json").read_text())
    assert contents["stages"] == [] and contents["gate"] is None and contents["config"]["name"] == "trial"


def test_curves_of_a_run_in_progress(folder):
    lines = [{"step": step, "reward_skill": step / 10, "motion_ratio": 1.0, "kl": 0.0} for step in range(12)]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    # The last line was cut short: the run was killed while writing it.
    (folder / "reinforce.jsonl").write_text(whole + '{"step": 12, "rewa')
    html = write_report(folder).read_text()
    assert "Stage 2: skill reward" in html and "Stage 1" not in html


@pytest.mark.parametrize(("rate", "words"), [(0.2, "fewer"), (0.6, "more"), (0.39, "no effect is shown")])
def test_verdict_says_what_the_interval_says(folder, rate, words):
    (folder / "eval").mkdir()
    (folder / "eval" / "summary.json").write_text(json.dumps(summary(rate)))
    html = write_report(folder).read_text()
    assert words in html.split("<h2>")[0] and f"<b>{rate:.0%}</b> after it" in html
    stages = json.loads((folder / "report.json").read_text())["stages"]
    assert [(stage["name"], stage["steps"]) for stage in stages] == [
        ("base", 0),
        ("ldo", Recipe().align.steps + Recipe().rl.updates),
    ]
    assert stages[1]["metrics"]["visible_violation_rate"]["mean"] == rate


def test_a_run_of_an_earlier_version_leads_with_its_strict_rate(folder):
    (folder / "eval").mkdir()
    (folder / "eval" / "summary.json").write_text(json.dumps(summary(0.2, rate="violation_rate")))
    head = write_report(folder).read_text().split("<h2>")[0]
    assert "40% break physics before LDO" in head and "<b>20%</b> after it" in head


def test_verdict_names_what_else_moved(folder):
    (folder / "eval").mkdir()
    contents = summary(0.39)
    contents["metrics"]["base"] |= {"existence": interval(0.6), "law_residual": interval(1.0)}
    contents["metrics"]["ldo"] |= {"existence": interval(0.8), "law_residual": interval(1.01)}
    contents["paired"]["ldo"] |= {"existence": interval(0.2), "law_residual": interval(0.01)}
    (folder / "eval" / "summary.json").write_text(json.dumps(contents))
    head, _, rest = write_report(folder).read_text().partition("<h2>")
    assert 'existence <b class="good">+0.200</b> [+0.180, +0.220]' in head and "law residual" not in head
    assert '<small class="good">+0.200 [+0.180, +0.220]</small>' in rest
    assert '<small class="">+0.010 [-0.010, +0.030]</small>' in rest
    contents["paired"]["ldo"] |= {"existence": interval(-0.2), "law_residual": interval(-0.2)}
    (folder / "eval" / "summary.json").write_text(json.dumps(contents))
    head = write_report(folder).read_text().partition("<h2>")[0]
    assert 'existence <b class="bad">-0.200</b>' in head and 'law residual <b class="good">-0.200</b>' in head


def test_page_escapes_what_comes_from_outside(folder):
    config = yaml.safe_load((folder / "recipe.yaml").read_text())
    config["model"]["path"] = "<script>x</script>"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert "<script>x" not in write_report(folder).read_text()


def test_command(folder, capsys):
    assert main([str(folder)]) == 0 and str(folder / "report.html") in capsys.readouterr().out
    assert main([str(folder / "missing")]) == 2 and "is not the folder of a run" in capsys.readouterr().err


def test_charts():
    # Where a stage has not begun there is nothing to draw.
    assert line_chart("x", {"a": []}) == ""
    drawn = line_chart("a < b", {"one": [(0, 1.0), (1, 2.0)], "two": [(0, 3.0)]})
    assert drawn.count("<polyline") == 2 and "a &lt; b" in drawn and "one" in drawn
    assert smooth([(0, 0.0), (1, 2.0), (2, 4.0)], 2) == [(0, 0.0), (1, 1.0), (2, 3.0)]
