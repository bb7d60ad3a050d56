"""The cache: names follow from content, entries are whole or absent, whatever kills or damages them."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from ldo import cache
from ldo.config import RecipeError

KEY = {"content": "abc", "window": 0, "size": [17, 32, 32], "fps": 8.0, "model": "def", "code": 1, "teacher": {"mode": "forecast"}}


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(3, 4, generator=g),
        "half": torch.randn(5, generator=g).bfloat16(),
        "mask": torch.tensor([True, False]),
        "number": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "turned": torch.randn(4, 6, generator=g).T,
    }


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_what_is_written_is_read(tmp_path):
    path = cache.entry(tmp_path, "latents", KEY)
    assert not cache.present(path) and cache.read(path) is None
    cache.write(path, tensors())
    assert cache.present(path) and same(cache.read(path), tensors())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize(
    "change",
    [{"content": "abd"}, {"window": 1}, {"size": [17, 32, 48]}, {"fps": 16.0}, {"model": "deg"}, {"code": 2}, {"teacher": {"mode": "encode"}}],
)
def test_whatever_an_entry_depends_on_gives_it_another_name(tmp_path, change):
    assert cache.entry(tmp_path, "latents", KEY | change).name != cache.entry(tmp_path, "latents", KEY).name


def test_kinds_and_orders(tmp_path):
    assert cache.entry(tmp_path, "text", KEY).name != cache.entry(tmp_path, "latents", KEY).name
    assert cache.entry(tmp_path, "text", dict(reversed(KEY.items()))) == cache.entry(tmp_path, "text", KEY)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_an_entry_cut_short_is_none(tmp_path, share):
    path = cache.entry(tmp_path, "latents", KEY)
    cache.write(path, tensors())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert not cache.present(path) and cache.read(path) is None
    cache.write(path, tensors())
    assert same(cache.read(path), tensors())


def test_foreign_and_damaged_entries_are_none(tmp_path):
    path, other = (cache.entry(tmp_path, "latents", KEY | {"window": w}) for w in (0, 1))
    cache.write(path, tensors())
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(path.read_bytes())  # a good file under another's name
    assert not cache.present(other) and cache.read(other) is None
    other.write_text("not ours")
    assert not cache.present(other) and cache.read(other) is None
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # one bit of a value
    path.write_bytes(data)
    assert cache.read(path) is None


def test_a_folder_that_takes_no_files_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"data\.cache: .* cannot be written \(.+\); free space there, or set data\.cache"):
        cache.write(cache.entry(tmp_path / "file", "latents", KEY), tensors())


# ------------------------------------------------------------------------------------------ several processes, sudden death


def start(work, *words):
    """``work(*words)`` in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work, args=words)
    process.start()
    return process


def wait_for(path):
    while not path.exists():
        time.sleep(0.001)


def write_often(path, times):
    x = {"x": torch.arange(500_000)}
    for _ in range(times):
        cache.write(path, x)


def test_two_writers_and_a_reader(tmp_path):
    path = cache.entry(tmp_path, "latents", KEY)
    writers = [start(write_often, path, 25) for _ in range(2)]
    met = 0
    while any(w.is_alive() for w in writers):
        if path.exists():
            found = cache.read(path)
            assert found is not None and torch.equal(found["x"], torch.arange(500_000))  # whole whenever it is there
            met += 1
    assert met > 2 and all(w.exitcode == 0 for w in writers)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_killed_in_the_middle_of_writing(tmp_path):
    path = cache.entry(tmp_path, "latents", KEY)
    luck = random.Random(0)
    for _ in range(4):
        path.unlink(missing_ok=True)
        process = start(write_often, path, 100_000)
        while not list(path.parent.glob("*.part")) and not path.exists():
            time.sleep(0.0005)
        time.sleep(luck.random() * 0.02)
        process.kill()
        process.join()
        assert not path.exists() or torch.equal(cache.read(path)["x"], torch.arange(500_000))
    left = path.parent / f"{path.stem}.1.dead.part"
    left.write_text("half an entry")
    cache.write(path, tensors())
    assert same(cache.read(path), tensors())
    cache.tidy(tmp_path)
    assert left.exists()  # its writer may be alive
    os.utime(left, (0, 0))
    cache.tidy(tmp_path)
    assert not left.exists() and path.exists()


def hold(lock, held):
    with cache.locked(lock):
        held.touch()
        time.sleep(100)


def test_a_killed_process_leaves_no_lock(tmp_path):
    process = start(hold, tmp_path / "lock", tmp_path / "held")
    wait_for(tmp_path / "held")
    process.kill()
    process.join()
    with cache.locked(tmp_path / "lock"):
        pass


def ask(folder, answer):
    def make(file):
        with open(folder / "made", "a") as out:
            out.write(file.name + "\n")
        time.sleep(0.02)
        return {"length": file.stat().st_size}

    answer.write_text(str(cache.facts(sorted(folder.glob("*.txt")), folder / "facts.jsonl", make, "facts")))


def test_facts_are_found_once_by_whoever_asks_first(tmp_path):
    for k in range(20):
        (tmp_path / f"{k:02d}.txt").write_text("x" * k)
    answers = [tmp_path / f"answer {k}" for k in range(3)]
    for asker in [start(ask, tmp_path, answer) for answer in answers]:
        asker.join()
    assert {a.read_text() for a in answers} == {str([{"length": k} for k in range(20)])}
    assert sorted((tmp_path / "made").read_text().split()) == [f"{k:02d}.txt" for k in range(20)]


def test_facts_are_found_again_for_what_changed_or_was_cut_short(tmp_path):
    files = [tmp_path / f"{k}.txt" for k in range(5)]
    for file in files:
        file.write_text("x")
    made = []

    def make(file: Path) -> dict:
        made.append(file.name)
        return {"text": file.read_text()}

    journal = tmp_path / "facts.jsonl"
    assert cache.facts(files, journal, make, "facts") == [{"text": "x"}] * 5
    journal.write_text(journal.read_text()[:-5])  # killed while it wrote the last line
    files[1].write_text("y")
    os.utime(files[1], ns=(1, 1))
    made.clear()
    assert [f["text"] for f in cache.facts(files, journal, make, "facts")] == ["x", "y", "x", "x", "x"]
    assert sorted(made) == ["1.txt", "4.txt"]
    made.clear()
    assert len(cache.facts([*files, files[0]], journal, make, "facts")) == 6 and not made


def test_a_models_identity_is_that_of_its_files(tmp_path):
    vae = tmp_path / "m" / "vae"
    vae.mkdir(parents=True)
    (vae / "config.json").write_text("{}")
    (vae / "w.safetensors").write_bytes(b"1234")
    (tmp_path / "m" / "transformer.bin").write_bytes(b"1")

    def identity():
        return cache.model_identity(tmp_path / "m", ["vae/*"], tmp_path / "store")

    first = identity()
    (tmp_path / "m" / "transformer.bin").write_bytes(b"2")
    os.utime(vae / "w.safetensors", ns=(5, 5))
    assert identity() == first
    (vae / "w.safetensors").write_bytes(b"1235")  # the same length
    assert identity() != first
    (vae / "w.safetensors").write_bytes(b"1234")
    assert identity() == first
    (vae / "config.json").write_text("{ }")
    assert identity() != first
