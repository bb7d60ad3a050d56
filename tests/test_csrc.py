"""csrc/ without torch: the CPU form and the kernels' bodies under sanitizers, the compiled kernels, and the build."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = (80, 90, 100, 120)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_both_forms_agree_and_the_sanitizers_are_silent(tmp_path):
    """The kernels' bodies run in an emulation of blocks, warps and grids, under two sanitizers."""
    program = tmp_path / "check"
    flags = [
        "-std=c++17",
        "-O0",
        "-g",
        "-ffp-contract=off",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-Wall",
        "-Wextra",
    ]
    sources = [ROOT / "tests/csrc/check.cpp", ROOT / "csrc/group_advantage.cpp"]
    compilation = subprocess.run(
        [COMPILER, *flags, "-I", ROOT / "csrc", "-I", ROOT / "tests/csrc", *sources, "-o", program, "-pthread"],
        capture_output=True,
        text=True,
    )
    assert compilation.returncode == 0, compilation.stderr[-3000:]
    completed = subprocess.run([program, "60", "1"], capture_output=True, text=True, timeout=300)
    # swapcontext: a note that the emulation's threads are unusual
    reports = [line for line in completed.stderr.splitlines() if "swapcontext" not in line]
    passed = completed.returncode == 0 and "60 cases, 0 failures" in completed.stdout and not reports
    assert passed, completed.stdout[-2000:] + completed.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_kernels_fit_in_registers(tmp_path):
    """No stack, no spills, and registers for two blocks of 256 threads on a multiprocessor.

    For every architecture that the wheel is built for.
    """
    targets = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}" for architecture in ARCHITECTURES]
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "--threads=2"]
    command = [NVCC, *flags, *targets, "-c", ROOT / "csrc/launch.cu", "-o", tmp_path / "o"]
    compilation = subprocess.run(command, capture_output=True, text=True)
    assert compilation.returncode == 0, compilation.stderr[-3000:]
    entry = r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    kernels = re.findall(rf"{entry}.*?{frame}.*?Used (\d+) registers", compilation.stderr, re.DOTALL)
    assert {int(architecture) for _, architecture, *_ in kernels} == set(ARCHITECTURES)
    # 3 types of rewards, 2 of log-probabilities
    assert len(kernels) == len(ARCHITECTURES) * 5
    for name, architecture, stack, stores, loads, registers in kernels:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{name} for sm_{architecture}"
        assert int(registers) <= 128, f"{name} for sm_{architecture}"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """``setup.py build_ext`` in a copy of what it needs, which is made on first use."""
    ignored = shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__")
    for entry in ("csrc", "ldo", "kernels", "recipes"):
        if not (folder / entry).exists():
            shutil.copytree(ROOT / entry, folder / entry, ignore=ignored)
    for entry in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / entry, folder)
    variables = {**os.environ, **environment}
    # else the build would import from this tree instead of the copy
    variables.pop("PYTHONPATH", None)
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_build_without_cuda_is_in_place_and_loads_without_torch(tmp_path):
    completed = build(tmp_path, LDO_CUDA="0")
    assert completed.returncode == 0 and "CUDA part: no, LDO_CUDA=0" in completed.stderr, completed.stderr[-2000:]
    (module,) = (tmp_path / "ldo").glob("_C.*")
    script = f"""if True:
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("_C", {str(module)!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.CUDA, "torch" in sys.modules)"""
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False", "False"]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or NVCC is None, reason="no C++ compiler or no nvcc")
def test_architectures_can_be_chosen_and_chosen_anew(tmp_path):
    """In one build folder: the numbers in any order and once each, the newest also as PTX for future GPUs."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    # The kernels themselves, which take longest, are compiled above.
    (tmp_path / "csrc" / "launch.cu").write_text("__global__ void nothing() {}\n")
    for chosen, reported, flags in (
        ("90", "sm_90", {"code=sm_90", "code=compute_90"}),
        ("90;80;90", "sm_80, sm_90", {"code=sm_80", "code=sm_90", "code=compute_90"}),
    ):
        completed = build(tmp_path, LDO_CUDA="1", CUDACXX=NVCC, LDO_CUDA_ARCHITECTURES=chosen)
        assert completed.returncode == 0 and re.search(rf", for {reported}$", completed.stderr, re.MULTILINE), (
            completed.stderr[-2000:]
        )
        (folder,) = (tmp_path / "build").glob("cmake-*-cuda")
        rules = [*folder.glob("build.ninja"), *folder.glob("CMakeFiles/_C.dir/flags.make")]
        written = "".join(path.read_text() for path in rules)
        assert set(re.findall(r"code=\w+", written)) == flags


@pytest.mark.parametrize(
    "environment, words",
    [
        (
            {"LDO_CUDA_ARCHITECTURES": "hopper"},
            "not built: LDO_CUDA_ARCHITECTURES='hopper' is not a number like 90, or several like 80;90\n",
        ),
        ({"LDO_CUDA_ARCHITECTURES": "90;"}, "LDO_CUDA_ARCHITECTURES='90;' is not a number"),
        ({"LDO_CUDA": "yes"}, "LDO_CUDA='yes' is not one of 0, 1, auto"),
        (
            {"PATH": "/nonexistent", "CXX": "/nonexistent/c++", "LDO_CUDA": "0"},
            "not built: (cmake is not installed|no C\\+\\+ compiler was found)",
        ),
    ],
)
def test_a_build_that_fails_says_why_and_exits_1(tmp_path, environment, words):
    completed = build(tmp_path, **environment)
    assert completed.returncode == 1, completed.stderr[-2000:]
    assert re.search(words, completed.stderr) and "Traceback" not in completed.stderr, completed.stderr[-2000:]
