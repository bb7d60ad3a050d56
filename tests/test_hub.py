"""Hugging Face datasets with a video column become folders of clips."""

import json
import shutil

import pytest
from films import encode, ramp

from ldo import data, hub
from ldo.config import Data, RecipeError


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets", reason="the datasets library is not installed here")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return library


@pytest.fixture
def films(tmp_path):
    """Two films and one of them again."""
    (tmp_path / "films").mkdir()
    paths = [encode(tmp_path / "films" / name, ramp(n)) for name, n in (("a.mp4", 20), ("b.mkv", 22))]
    return [str(p) for p in (*paths, paths[0])]


def table(datasets, films, **columns):
    made = datasets.Dataset.from_dict({"film": films, **(columns or {"text": ["one", "two", "three"]})})
    return made.cast_column("film", datasets.Video(decode=False))


def read(source, store, caption=""):
    assert hub.is_dataset(str(source))
    folder = hub.clips_folder(str(source), caption, store)
    return folder, data.read_folder(folder, Data(frames=17, fps=24), store)


@pytest.mark.parametrize("form", ["saved", "saved dict", "parquet", "folder of parquet"])
def test_a_dataset_is_read_like_a_folder(datasets, films, tmp_path, form):
    made = table(datasets, films)
    source = tmp_path / "source"
    if form == "saved":
        made.save_to_disk(source)
    elif form == "saved dict":
        datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(source)
    elif form == "parquet":
        made.to_parquet(source := source.with_suffix(".parquet"))
    else:
        made.to_parquet(source / "data" / "train-0.parquet")
    if form.startswith("saved"):
        shutil.rmtree(tmp_path / "films")  # its bytes are inside
    folder, clips = read(source, tmp_path / "store")
    assert [(c.text, c.frames) for c in clips] == [("one", 20), ("two", 22), ("three", 20)]
    assert clips[0].path == clips[2].path and clips[0].path.suffix == ".mp4" and clips[1].path.suffix == ".mkv"
    if form.startswith("saved"):
        assert len(list(folder.glob("*.m*"))) == 2
        before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
        assert read(source, tmp_path / "store") == (folder, clips)
        assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_which_column_is_the_caption(datasets, films, tmp_path):
    made = table(datasets, films, caption=["a", "b", "c"], long=["d", "e", "f"])
    made.save_to_disk(tmp_path / "source")
    assert [c.text for c in read(tmp_path / "source", tmp_path / "store")[1]] == ["a", "b", "c"]
    assert [c.text for c in read(tmp_path / "source", tmp_path / "store", "long")[1]] == ["d", "e", "f"]


def test_what_is_missing_is_told(datasets, films, tmp_path):
    store = tmp_path / "store"
    table(datasets, films, words=["a", "b", "c"]).save_to_disk(tmp_path / "uncaptioned")
    with pytest.raises(RecipeError, match=r"data\.caption: .* has no column text or caption; name one of film, words"):
        hub.clips_folder(str(tmp_path / "uncaptioned"), "", store)
    datasets.Dataset.from_dict({"text": ["a"], "name": ["b"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(RecipeError, match="has no video column, only text, name"):
        hub.clips_folder(str(tmp_path / "words"), "", store)
    datasets.DatasetDict({"test": table(datasets, films)}).save_to_disk(tmp_path / "split")
    with pytest.raises(RecipeError, match="has no split train, only test"):
        hub.clips_folder(str(tmp_path / "split"), "", store)
    table(datasets, [films[0], None, films[1]]).save_to_disk(tmp_path / "hole")
    with pytest.raises(RecipeError, match="holds a row without a video"):
        hub.clips_folder(str(tmp_path / "hole"), "", store)
    (tmp_path / "bad.parquet").write_text("nothing")
    with pytest.raises(RecipeError, match=r"data\.videos: .*bad\.parquet cannot be loaded \(.+\)$"):
        hub.clips_folder(str(tmp_path / "bad.parquet"), "", store)


@pytest.mark.parametrize(("source", "asked"), [("hf:owner/name", ("owner/name", "train")), ("hf:owner/name:test", ("owner/name", "test"))])
def test_a_dataset_of_the_hub(datasets, films, tmp_path, monkeypatch, source, asked):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: calls.append((name, split)) or table(datasets, films))
    assert [c.text for c in read(source, tmp_path / "store")[1]] == ["one", "two", "three"] and calls == [asked]

    def lost(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", lost)
    with pytest.raises(RecipeError, match=rf"{source} cannot be loaded \(ConnectionError: no network at all\)$"):
        hub.clips_folder(source, "", tmp_path / "store")


def test_without_the_library_the_mend_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"hf:owner/name is a Hugging Face dataset, which needs: pip install 'ldo\[datasets\]'"):
        hub.clips_folder("hf:owner/name", "", tmp_path)


def test_a_folder_of_clips_is_not_a_dataset(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "x"}))
    assert not hub.is_dataset(str(tmp_path)) and not hub.is_dataset("sandbox") and hub.is_dataset("hf:owner/name:test")
