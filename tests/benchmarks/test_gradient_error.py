"""The decomposition of the gradient's error, and the arithmetic that it imitates."""

import json
import sys

import pytest
import torch

from benchmarks import gradient_error
from ldo.kernels import relation_plan

CONFIG = relation_plan.Config(128, 256, 64, 2, 8, 4, True, truncation=1e-6)


def pair_of_features(n=192, ds=512, dt=256):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, generator=generator).bfloat16() for width in (ds, dt)]


def test_truncation_is_towards_zero():
    values = torch.tensor([1 + 2**-30, -1 - 2**-30, 1 + 2**-23 + 2**-24 + 2**-30, 0.0, 3.0], dtype=torch.float64)
    assert gradient_error.truncated(values).tolist() == [1.0, -1.0, 1 + 2**-23, 0.0, 3.0]


def test_gains_compensate_truncation():
    """On average a fraction of a unit in the last place in each step.

    That is a bias, which gains undo, and a spread, which they cannot undo.
    """
    student, teacher = pair_of_features()
    exact = gradient_error.exact(student, teacher)
    # pairs whose sign rounding cannot change
    distant = exact.abs() > 0.05
    uncorrected = gradient_error.imitated(student, teacher)
    truncation = gradient_error.lost(uncorrected, student, teacher)
    assert truncation == pytest.approx(relation_plan.HOPPER, rel=0.1)
    config = relation_plan.Config(128, 256, 64, 2, 8, 4, True, truncation=truncation)
    corrected = gradient_error.imitated(student, teacher, relation_plan.gains(config, 512, 256))

    def bias(found):
        return float(((found - exact) * exact.sign())[distant].mean())

    assert bias(uncorrected) < -5e-8 and abs(bias(corrected)) < 0.15 * abs(bias(uncorrected))


def test_without_truncation_there_are_no_gains():
    assert relation_plan.gains(relation_plan.ON_CPU, 1920, 1024) == (1.0, 1.0)
    at_the_end, between = relation_plan.gains(CONFIG, 1920, 1024)
    assert at_the_end**2 == pytest.approx(1 + 60e-6) and between**2 == pytest.approx(1 + 92e-6)


def test_decomposition_runs_small(monkeypatch, tmp_path, capsys):
    result_path = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--sizes", "256", "--widths", "512x256", "--out", str(result_path)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    usual = relation_plan.gains
    # the script switches gains off and must put them back
    assert gradient_error.main() == 0 and relation_plan.gains is usual
    without, gained = json.loads(result_path.read_text())["rows"]
    assert (without["gains"], gained["gains"]) == (False, True) and "with gains" in capsys.readouterr().out
    for row in (without, gained):
        errors = row["errors"]
        assert 1e-3 < errors["A"] < 3e-3 and 1e-3 < errors["output"] < 3e-3
        # the sources are independent, so their squares add up
        parts = sum(errors[source] ** 2 for source in ("flips", "A", "output")) ** 0.5
        assert errors["all"] == pytest.approx(parts, rel=0.1)
    assert gained["flipped"] <= without["flipped"]


@pytest.mark.gpu
def test_gains_hold_on_this_gpu():
    """Truncation is measured on Hopper; elsewhere nothing is compensated, and the numbers say how far off that is."""
    device = torch.device("cuda")
    without, gained = gradient_error.rows(4096, 1920, 1024, device)
    if torch.cuda.get_device_capability()[0] == 9:
        assert gained["flipped"] < without["flipped"] and gained["errors"]["all"] < 4e-3
