"""The machine's limits are given to the benchmarks' tests, not measured."""

import pytest

from benchmarks import timing


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(timing, "matmul_tflops", lambda *_: 0.1)
    monkeypatch.setattr(timing, "copy_gbps", lambda *_: 10.0)
