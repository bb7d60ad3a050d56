"""The cache: names follow from content, entries are whole or absent, whatever kills or damages them."""

import errno
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch

from ldo.core.errors import RecipeError
from ldo.data.cache import entry_path, has_entry, read_entry, remove_leftovers, write_entry
from ldo.data.file_facts import file_facts, file_lock, model_identity

KEY = {
    "content": "abc",
    "window": 0,
    "size": [17, 32, 32],
    "fps": 8.0,
    "model": "def",
    "code": 1,
    "teacher": {"mode": "forecast"},
}


def tensors(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(3, 4, generator=rng),
        "half": torch.randn(5, generator=rng).bfloat16(),
        "mask": torch.tensor([True, False]),
        "number": torch.tensor(7),
        "none": torch.zeros(0, 3),
        # not contiguous in memory, as safetensors wants it
        "turned": torch.randn(4, 6, generator=rng).T,
    }


def same(found, expected):
    if found.keys() != expected.keys():
        return False
    # torch.equal compares values, whatever the types
    pairs = [(found[name], expected[name]) for name in found]
    return all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)


def test_what_is_written_is_read(tmp_path):
    path = entry_path(tmp_path, "latents", KEY)
    assert not has_entry(path) and read_entry(path) is None
    write_entry(path, tensors())
    assert has_entry(path) and same(read_entry(path), tensors())
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"content": "abd"},
        {"window": 1},
        {"size": [17, 32, 48]},
        {"fps": 16.0},
        {"model": "deg"},
        {"code": 2},
        {"teacher": {"mode": "encode"}},
    ],
)
def test_whatever_an_entry_depends_on_gives_it_another_name(tmp_path, change):
    assert entry_path(tmp_path, "latents", KEY | change).name != entry_path(tmp_path, "latents", KEY).name


def test_kinds_and_orders(tmp_path):
    assert entry_path(tmp_path, "text", KEY).name != entry_path(tmp_path, "latents", KEY).name
    assert entry_path(tmp_path, "text", dict(reversed(KEY.items()))) == entry_path(tmp_path, "text", KEY)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_an_entry_cut_short_is_none(tmp_path, share):
    path = entry_path(tmp_path, "latents", KEY)
    write_entry(path, tensors())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert not has_entry(path) and read_entry(path) is None
    # what is broken does not stay so: the next writer replaces it
    write_entry(path, tensors())
    assert same(read_entry(path), tensors())


def test_foreign_and_damaged_entries_are_none(tmp_path):
    path, other = (entry_path(tmp_path, "latents", KEY | {"window": window}) for window in (0, 1))
    write_entry(path, tensors())
    other.parent.mkdir(parents=True, exist_ok=True)
    # a good file under another's name
    other.write_bytes(path.read_bytes())
    assert not has_entry(other) and read_entry(other) is None
    other.write_text("not ours")
    assert not has_entry(other) and read_entry(other) is None
    data = bytearray(path.read_bytes())
    # one bit of a value
    data[-3] ^= 1
    path.write_bytes(data)
    assert read_entry(path) is None


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RecipeError, match=r"data\.cache: .* cannot be written \(.+\); free space there, or set data\.cache"
    ):
        write_entry(entry_path(tmp_path / "file", "latents", KEY), tensors())


# -------------------------------------------------------------------------------- several processes, sudden death


def start(work, *words):
    """``work(*words)`` in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work, args=words)
    process.start()
    return process


def wait_for(path):
    while not path.exists():
        time.sleep(0.001)


def write_often(path, times):
    entry = {"x": torch.arange(500_000)}
    for _ in range(times):
        write_entry(path, entry)


def test_two_writers_and_a_reader(tmp_path):
    path = entry_path(tmp_path, "latents", KEY)
    writers = [start(write_often, path, 25) for _ in range(2)]
    whole_entries = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            found = read_entry(path)
            # whole whenever it is there
            assert found is not None and torch.equal(found["x"], torch.arange(500_000))
            whole_entries += 1
    assert whole_entries > 2 and all(writer.exitcode == 0 for writer in writers)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_killed_in_the_middle_of_writing(tmp_path):
    path = entry_path(tmp_path, "latents", KEY)
    rng = random.Random(0)
    for _ in range(4):
        path.unlink(missing_ok=True)
        process = start(write_often, path, 100_000)
        # killed at a time that differs with every round, once it is writing
        while not list(path.parent.glob("*.part")) and not path.exists():
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
        assert not path.exists() or torch.equal(read_entry(path)["x"], torch.arange(500_000))
    leftover = path.parent / f"{path.stem}.1.dead.part"
    leftover.write_text("half an entry")
    write_entry(path, tensors())
    assert same(read_entry(path), tensors())
    remove_leftovers(tmp_path)
    # its writer may be alive
    assert leftover.exists()
    os.utime(leftover, (0, 0))
    remove_leftovers(tmp_path)
    assert not leftover.exists() and path.exists()


def hold(lock, held):
    with file_lock(lock):
        held.touch()
        time.sleep(100)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has locks everywhere")
def test_lock_has_no_effect_where_a_file_system_has_none(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    # the second time the file of the first is there: it must not be taken for a lock that is held
    for _ in range(2):
        with file_lock(tmp_path / "lock"):
            pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    process = start(hold, tmp_path / "lock", tmp_path / "held")
    wait_for(tmp_path / "held")
    process.kill()
    process.join()
    with file_lock(tmp_path / "lock"):
        pass


def ask(folder, answer):
    def make(file):
        with open(folder / "made", "a") as out:
            out.write(file.name + "\n")
        time.sleep(0.02)
        return {"length": file.stat().st_size}

    answer.write_text(str(file_facts(sorted(folder.glob("*.txt")), folder / "facts.jsonl", make, "facts")))


def test_facts_are_found_once_by_whoever_asks_first(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text("x" * number)
    answers = [tmp_path / f"answer {number}" for number in range(3)]
    processes = [start(ask, tmp_path, answer) for answer in answers]
    for process in processes:
        process.join()
    expected = [{"length": number} for number in range(20)]
    assert {answer.read_text() for answer in answers} == {str(expected)}
    # each file was looked at once, by one of the three
    assert sorted((tmp_path / "made").read_text().split()) == [f"{number:02d}.txt" for number in range(20)]


def test_facts_are_found_again_for_what_changed_or_was_cut_short(tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(5)]
    for file in files:
        file.write_text("x")
    looked_at = []

    def make(file: Path) -> dict:
        looked_at.append(file.name)
        return {"text": file.read_text()}

    journal = tmp_path / "facts.jsonl"
    assert file_facts(files, journal, make, "facts") == [{"text": "x"}] * 5
    # killed while it wrote the last line
    journal.write_text(journal.read_text()[:-5])
    files[1].write_text("y")
    os.utime(files[1], ns=(1, 1))
    looked_at.clear()
    assert [facts["text"] for facts in file_facts(files, journal, make, "facts")] == ["x", "y", "x", "x", "x"]
    assert sorted(looked_at) == ["1.txt", "4.txt"]
    looked_at.clear()
    assert len(file_facts([*files, files[0]], journal, make, "facts")) == 6 and not looked_at


def test_a_models_identity_is_that_of_its_files(tmp_path):
    vae = tmp_path / "m" / "vae"
    vae.mkdir(parents=True)
    (vae / "config.json").write_text("{}")
    (vae / "w.safetensors").write_bytes(b"1234")
    (tmp_path / "m" / "transformer.bin").write_bytes(b"1")

    def identity():
        return model_identity(tmp_path / "m", ["vae/*"], tmp_path / "store")

    first = identity()
    # neither a file of another part nor a time of change matters
    (tmp_path / "m" / "transformer.bin").write_bytes(b"2")
    os.utime(vae / "w.safetensors", ns=(5, 5))
    assert identity() == first
    # the same length
    (vae / "w.safetensors").write_bytes(b"1235")
    assert identity() != first
    (vae / "w.safetensors").write_bytes(b"1234")
    assert identity() == first
    (vae / "config.json").write_text("{ }")
    assert identity() != first
