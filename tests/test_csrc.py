"""csrc/ without torch: the CPU form and the kernels' bodies under sanitizers, what nvcc makes of the kernels, and what the build says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = (80, 90, 100, 120)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_both_forms_agree_and_the_sanitizers_are_silent(tmp_path):
    """The kernels' bodies run in an emulation of blocks, warps and grids; address and undefined-behaviour sanitizers watch."""
    program = tmp_path / "check"
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"]
    sources = [ROOT / "tests/csrc/check.cpp", ROOT / "csrc/group_advantage.cpp"]
    built = subprocess.run(
        [COMPILER, *flags, "-I", ROOT / "csrc", "-I", ROOT / "tests/csrc", *sources, "-o", program, "-pthread"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    found = subprocess.run([program, "60", "1"], capture_output=True, text=True, timeout=300)
    said = [line for line in found.stderr.splitlines() if "swapcontext" not in line]  # a note that the emulation's threads are unusual
    assert found.returncode == 0 and "60 cases, 0 failures" in found.stdout and not said, found.stdout[-2000:] + found.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_kernels_fit_in_registers(tmp_path):
    """For every architecture that the wheel is built for: no stack, no spills, and registers for two blocks of 256 threads a multiprocessor."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "--threads=2", *targets, "-c", ROOT / "csrc/launch.cu", "-o", tmp_path / "o"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    frame, used = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", r"Used (\d+) registers"
    seen = re.findall(rf"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?{frame}.*?{used}", built.stderr, re.DOTALL)
    assert {int(arch) for _, arch, *_ in seen} == set(ARCHITECTURES) and len(seen) == len(ARCHITECTURES) * 5  # 3 reward types, 2 of log-probs
    for name, arch, stack, stores, loads, registers in seen:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{name} for sm_{arch}"
        assert int(registers) <= 128, f"{name} for sm_{arch}"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """``setup.py build_ext`` in a copy of what it needs, which is made if it is not there."""
    for name in ("csrc", "ldo", "kernels", "recipes"):
        if not (folder / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    return subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_build_without_cuda_is_in_place_and_loads_without_torch(tmp_path):
    found = build(tmp_path, LDO_CUDA="0")
    assert found.returncode == 0 and "CUDA part: no, LDO_CUDA=0" in found.stderr, found.stderr[-2000:]
    (module,) = (tmp_path / "ldo").glob("_C.*")
    code = f"""if True:
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("_C", {str(module)!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.CUDA, "torch" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or NVCC is None, reason="no C++ compiler or no nvcc")
def test_architectures_can_be_chosen_and_chosen_anew(tmp_path):
    """In one build folder: the numbers in any order and once each, the newest also as PTX for GPUs to come."""
    for chosen, said, flags in (
        ("90", "sm_90", {"code=sm_90", "code=compute_90"}),
        ("90;80;90", "sm_80, sm_90", {"code=sm_80", "code=sm_90", "code=compute_90"}),
    ):
        found = build(tmp_path, LDO_CUDA="1", CUDACXX=NVCC, LDO_CUDA_ARCHITECTURES=chosen)
        assert found.returncode == 0 and re.search(rf", for {said}$", found.stderr, re.MULTILINE), found.stderr[-2000:]
        (folder,) = (tmp_path / "build").glob("cmake-*-cuda")
        written = "".join(p.read_text() for p in (*folder.glob("build.ninja"), *folder.glob("CMakeFiles/_C.dir/flags.make")))
        assert set(re.findall(r"code=\w+", written)) == flags


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"LDO_CUDA_ARCHITECTURES": "hopper"}, "not built: LDO_CUDA_ARCHITECTURES='hopper' is not a number like 90, or several like 80;90\n"),
        ({"LDO_CUDA_ARCHITECTURES": "90;"}, "LDO_CUDA_ARCHITECTURES='90;' is not a number"),
        ({"LDO_CUDA": "yes"}, "LDO_CUDA='yes' is not one of 0, 1, auto"),
        ({"PATH": "/nonexistent", "CXX": "/nonexistent/c++", "LDO_CUDA": "0"}, "not built: (cmake is not installed|no C\\+\\+ compiler was found)"),
    ],
)
def test_build_that_cannot_be_says_why_and_exits_1(tmp_path, environment, words):
    found = build(tmp_path, **environment)
    assert found.returncode == 1 and re.search(words, found.stderr) and "Traceback" not in found.stderr, found.stderr[-2000:]
