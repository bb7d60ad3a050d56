"""Progress on a log file: lines with the time left, always the last one, and none from other ranks."""

from ldo.core.progress import Bar, batches, with_bar


def test_the_end_is_always_reported(capsys):
    with Bar("align", 4, done=1) as bar:
        for _ in range(3):
            bar.advance("loss 0.21")
    # Far too fast for a line every few seconds: the one line there is comes from the end.
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("align")
    assert "4/4" in line
    assert "left" in line
    assert line.endswith("loss 0.21")


def test_long_work_reports_on_the_way(capsys, monkeypatch):
    # Below zero, since two readings of the clock may be equal.
    monkeypatch.setattr("ldo.core.progress.LINE_EVERY", -1.0)
    assert list(with_bar("clips", "abc", 3)) == ["a", "b", "c"]
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_slices_cover_everything_once(capsys):
    numbers = list(range(10))
    assert [numbers[part] for part in batches("encode", 10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert "10/10" in capsys.readouterr().err


def test_other_ranks_are_silent(capsys):
    list(batches("encode", 10, 4, active=False))
    assert capsys.readouterr().err == ""
