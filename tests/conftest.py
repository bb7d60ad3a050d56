"""Fixtures shared by all tests: tiny random models in the real formats, loaded once."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run, slowly, on the CPU
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # tiny models' few channels are padded to the width of registers: alike on every CPU

sys.path.insert(0, str(Path(__file__).parent))  # tests/models.py and its like
sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # tests/kernels/aot.py

import models

from ldo import generator
from ldo.world_model import WorldModel


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    return models.write_wan(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="session")
def vjepa_folder(tmp_path_factory):
    return models.write_vjepa(tmp_path_factory.mktemp("models") / "vjepa")


@pytest.fixture
def wan(wan_folder):
    """A fresh generator: tests put adapters on it."""
    return generator.load("wan", wan_folder, options=generator.Options(text_length=16))


@pytest.fixture(scope="session")
def judge(vjepa_folder):
    return WorldModel.load(vjepa_folder)


@pytest.fixture
def frames():
    """Two moving clips [2, 17, 3, 32, 32]."""
    import numpy as np

    from ldo.rng import numpy_rng
    from ldo.sandbox import scenes, simulate

    drawn = [scenes.sample_scene(numpy_rng(1, "frames", i), kind=k) for i, k in enumerate(("uniform", "bounce"))]
    return torch.from_numpy(np.stack([simulate.render(simulate.track(s)) for s in drawn]))


@pytest.fixture(scope="session")
def sandbox_data(tmp_path_factory, wan_folder, vjepa_folder):
    """The small recipe's clips and prompts, written once."""
    import recipes
    from ldo import run
    from ldo.check import check
    from ldo.config import read
    from ldo.distributed import World

    folder = tmp_path_factory.mktemp("data")
    run.sandbox_clips(run.load(check(read(recipes.write(folder, wan_folder, vjepa_folder))), World()))
    return folder / "runs" / "sandbox-data"


@pytest.fixture
def open_run(tmp_path, wan_folder, vjepa_folder, sandbox_data):
    """Load a run of the small recipe in this process: ``open_run(rl__updates=2)``; the same folder every time."""
    import recipes
    from ldo import run
    from ldo.check import check
    from ldo.config import read
    from ldo.distributed import World

    shutil.copytree(sandbox_data, tmp_path / "runs" / "sandbox-data")

    def make(**changes):
        recipe = read(recipes.write(tmp_path, wan_folder, vjepa_folder, **changes))
        return run.load(check(recipe), World())

    return make
