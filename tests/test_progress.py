"""Progress on a log file: lines with the time left, the last one always, none where another rank speaks."""

from ldo.progress import Bar, batches, each


def test_the_end_is_always_said(capsys):
    with Bar("align", 4, done=1) as bar:
        for _ in range(3):
            bar.advance("loss 0.21")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("align") and "4/4" in line and "left" in line and line.endswith("loss 0.21")


def test_long_work_speaks_on_the_way(capsys, monkeypatch):
    monkeypatch.setattr("ldo.progress.EVERY", -1.0)
    assert list(each("clips", "abc", 3)) == ["a", "b", "c"]
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_slices_cover_everything_once(capsys):
    assert [list(range(10))[s] for s in batches("encode", 10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert "10/10" in capsys.readouterr().err


def test_other_ranks_are_silent(capsys):
    list(batches("encode", 10, 4, active=False))
    assert capsys.readouterr().err == ""
