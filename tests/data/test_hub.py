"""Hugging Face datasets with a video column become folders of clips."""

import json
import shutil
import sys

import pytest

from ldo.core.config import DataConfig
from ldo.core.errors import RecipeError
from ldo.data import hub
from ldo.data.folder import read_folder
from tests.helpers.video_files import encode, ramp


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets", reason="the datasets library is not installed here")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return library


@pytest.fixture
def videos(tmp_path):
    """Two video files, and one of them again."""
    (tmp_path / "videos").mkdir()
    short = encode(tmp_path / "videos" / "a.mp4", ramp(20))
    longer = encode(tmp_path / "videos" / "b.mkv", ramp(22))
    return [str(short), str(longer), str(short)]


def table(datasets, videos, **columns):
    dataset = datasets.Dataset.from_dict({"video": videos, **(columns or {"text": ["one", "two", "three"]})})
    return dataset.cast_column("video", datasets.Video(decode=False))


def read(source, store, caption=""):
    assert hub.is_dataset(str(source))
    folder = hub.clips_folder(str(source), caption, store)
    return folder, read_folder(folder, DataConfig(frames=17, fps=24), store)


@pytest.mark.parametrize("form", ["saved", "saved dict", "parquet", "folder of parquet"])
def test_a_dataset_is_read_like_a_folder(datasets, videos, tmp_path, form):
    dataset = table(datasets, videos)
    source = tmp_path / ("source.parquet" if form == "parquet" else "source")
    if form == "saved":
        dataset.save_to_disk(source)
    elif form == "saved dict":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(source)
    elif form == "parquet":
        dataset.to_parquet(source)
    else:
        dataset.to_parquet(source / "data" / "train-0.parquet")
    if form.startswith("saved"):
        # the dataset holds their bytes; a parquet file names where they are
        shutil.rmtree(tmp_path / "videos")
    folder, clips = read(source, tmp_path / "store")
    assert [(clip.text, clip.frames) for clip in clips] == [("one", 20), ("two", 22), ("three", 20)]
    assert clips[0].path == clips[2].path and clips[0].path.suffix == ".mp4" and clips[1].path.suffix == ".mkv"
    if form.startswith("saved"):
        assert len(list(folder.glob("*.m*"))) == 2
        # asked again, nothing is written again
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert read(source, tmp_path / "store") == (folder, clips)
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_which_column_is_the_caption(datasets, videos, tmp_path):
    dataset = table(datasets, videos, caption=["a", "b", "c"], long=["d", "e", "f"])
    dataset.save_to_disk(tmp_path / "source")
    assert [clip.text for clip in read(tmp_path / "source", tmp_path / "store")[1]] == ["a", "b", "c"]
    assert [clip.text for clip in read(tmp_path / "source", tmp_path / "store", "long")[1]] == ["d", "e", "f"]


def test_what_is_missing_is_named(datasets, videos, tmp_path):
    store = tmp_path / "store"
    table(datasets, videos, words=["a", "b", "c"]).save_to_disk(tmp_path / "uncaptioned")
    with pytest.raises(RecipeError, match=r"data\.caption: .* has no column text or caption; name one of video, words"):
        hub.clips_folder(str(tmp_path / "uncaptioned"), "", store)
    datasets.Dataset.from_dict({"text": ["a"], "name": ["b"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(RecipeError, match="has no video column, only text, name"):
        hub.clips_folder(str(tmp_path / "words"), "", store)
    datasets.DatasetDict({"test": table(datasets, videos)}).save_to_disk(tmp_path / "split")
    with pytest.raises(RecipeError, match="has no split train, only test"):
        hub.clips_folder(str(tmp_path / "split"), "", store)
    table(datasets, [videos[0], None, videos[1]]).save_to_disk(tmp_path / "hole")
    with pytest.raises(RecipeError, match="holds a row without a video"):
        hub.clips_folder(str(tmp_path / "hole"), "", store)
    (tmp_path / "bad.parquet").write_text("nothing")
    with pytest.raises(RecipeError, match=r"data\.videos: .*bad\.parquet cannot be loaded \(.+\)$"):
        hub.clips_folder(str(tmp_path / "bad.parquet"), "", store)


@pytest.mark.parametrize(
    ("source", "asked"), [("hf:owner/name", ("owner/name", "train")), ("hf:owner/name:test", ("owner/name", "test"))]
)
def test_a_dataset_of_the_hub(datasets, videos, tmp_path, monkeypatch, source, asked):
    calls = []

    def load(name, split):
        calls.append((name, split))
        return table(datasets, videos)

    monkeypatch.setattr(datasets, "load_dataset", load)
    _, clips = read(source, tmp_path / "store")
    assert [clip.text for clip in clips] == ["one", "two", "three"] and calls == [asked]

    def lost(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", lost)
    with pytest.raises(RecipeError, match=rf"{source} cannot be loaded \(ConnectionError: no network at all\)$"):
        hub.clips_folder(source, "", tmp_path / "store")


def test_without_the_library_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        RecipeError, match=r"hf:owner/name is a Hugging Face dataset, which needs: pip install 'ldo\[datasets\]'"
    ):
        hub.clips_folder("hf:owner/name", "", tmp_path)


def test_a_folder_of_clips_is_not_a_dataset(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "x"}))
    assert not hub.is_dataset(str(tmp_path)) and not hub.is_dataset("sandbox") and hub.is_dataset("hf:owner/name:test")
