"""Fixtures shared by all tests: tiny random models in the real formats, loaded once."""

import gc
import os
import shutil

import pytest
import torch

# Both are read when Triton and oneDNN are first imported, which the tests' modules do.
if not torch.cuda.is_available():
    # Triton's kernels then run, slowly, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The few channels of tiny models are padded to the width of registers: this way alike on every CPU.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


# Fixtures import what they need of ldo and the model libraries: pytest-xdist's first process, which runs no tests and
# which the others wait for, reads this file too.


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect():
    """What is there before a file's tests outlives them: collections, which benchmarks ask for often, pass over it."""
    # First, lest garbage is kept. It takes no time but once: what an earlier file froze is passed over.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """What is written need not outlast a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    from tests.helpers import models

    return models.write_wan(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="session")
def vjepa_folder(tmp_path_factory):
    from tests.helpers import models

    return models.write_vjepa(tmp_path_factory.mktemp("models") / "vjepa")


@pytest.fixture
def wan(wan_folder):
    """A fresh generator: tests put adapters on it."""
    from ldo.models.generator.families import load_generator
    from ldo.models.generator.protocol import Options

    return load_generator("wan", wan_folder, options=Options(text_length=16))


@pytest.fixture(scope="session")
def judge(vjepa_folder):
    from ldo.models.world_model import WorldModel

    return WorldModel.load(vjepa_folder)


@pytest.fixture
def frames():
    """Two moving clips [2, 17, 3, 32, 32]."""
    import numpy as np

    from ldo.core.rng import numpy_rng
    from ldo.sandbox import scenes, simulate

    drawn = [scenes.sample_scene(numpy_rng(1, "frames", i), kind=k) for i, k in enumerate(("uniform", "bounce"))]
    return torch.from_numpy(np.stack([simulate.render(simulate.track(s)) for s in drawn]))


@pytest.fixture(scope="session")
def sandbox_data(tmp_path_factory, wan_folder, vjepa_folder):
    """The small recipe's clips and prompts, written once."""
    from ldo.core.distributed import Processes
    from ldo.core.recipe_file import read_recipe
    from ldo.run.load import load_run, sandbox_clips
    from ldo.run.validate import validate
    from tests.helpers import recipes

    folder = tmp_path_factory.mktemp("data")
    sandbox_clips(load_run(validate(read_recipe(recipes.write(folder, wan_folder, vjepa_folder))), Processes()))
    return folder / "runs" / "sandbox-data"


@pytest.fixture
def open_run(tmp_path, wan_folder, vjepa_folder, sandbox_data):
    """Load a run of the small recipe in this process: ``open_run(rl__updates=2)``; the same folder every time."""
    from ldo.core.distributed import Processes
    from ldo.core.recipe_file import read_recipe
    from ldo.run.load import load_run
    from ldo.run.validate import validate
    from tests.helpers import recipes

    shutil.copytree(sandbox_data, tmp_path / "runs" / "sandbox-data")

    def make(**changes):
        recipe = read_recipe(recipes.write(tmp_path, wan_folder, vjepa_folder, **changes))
        return load_run(validate(recipe), Processes())

    return make
