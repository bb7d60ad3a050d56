"""Builds the extension ldo._C, and names the packages that setuptools does not find; the rest is in pyproject.toml.

``python setup.py build_ext`` builds csrc/ in place through CMake and exits 1 if it cannot. ``pip install`` continues
without the extension, since everything also runs as plain PyTorch.

    LDO_CUDA=0|1|auto               without the CUDA part, with it or an error, with it if nvcc is found (default auto)
    LDO_CUDA_ARCHITECTURES=80;90    only for GPUs of these compute capabilities, which builds faster (default: all those
                                    of CMakeLists.txt that nvcc knows)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CannotBuild(Exception):
    """The extension cannot be built here; the message says why, in one line."""


def say(line: str) -> None:
    """Print to stderr, so that pip -v shows it in order."""
    print(f"ldo._C: {line}", file=sys.stderr, flush=True)


class Build(build_ext):
    """Lets CMake build the module where setuptools wants it.

    That is in the tree for build_ext and editable installs, else in the wheel.
    """

    def finalize_options(self) -> None:
        # a direct build_ext: in place, unless a folder is given
        if "build_ext" in sys.argv:
            self.inplace = self.inplace or self.build_lib is None
        super().finalize_options()

    def run(self) -> None:
        began = time.monotonic()
        try:
            for extension in self.extensions:
                self.build_with_cmake(Path(self.get_ext_fullpath(extension.name)).resolve())
        except CannotBuild as problem:
            if "build_ext" in sys.argv:
                sys.exit(f"ldo._C: not built: {problem}")
            say(f"not built: {problem}. ldo works without it, as plain PyTorch; python setup.py build_ext tries again")
            # with none left setuptools does not look for the file that was to be built
            self.extensions = []
            return
        say(f"built in {time.monotonic() - began:.0f} s")

    def build_with_cmake(self, target: Path) -> None:
        """Configure and build, in one folder for each interpreter and choice of CUDA, and copy the module to target."""
        cuda = requested_cuda()
        architectures = requested_architectures()
        cmake = shutil.which("cmake") or program("cmake")
        if cmake is None:
            raise CannotBuild("cmake is not installed; pip install cmake ninja")
        check_compiler()
        nvcc = chosen_nvcc(cuda)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-cuda' if nvcc else ''}"
        build.mkdir(parents=True, exist_ok=True)
        # the cache may name tools of an environment that is gone
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        made = build / "out"
        shutil.rmtree(made, ignore_errors=True)
        options = [f"-D{name}={value}" for name, value in cmake_options(made, nvcc, architectures).items()]
        log = build / "build.log"
        configure = [cmake, "-S", ROOT, "-B", build, *generator(), *options]
        compile_all = [cmake, "--build", build, "--parallel", str(os.cpu_count() or 2)]
        with log.open("w") as output:
            for command in (configure, compile_all):
                if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                    raise CannotBuild(f"{reason(log.read_text())} (whole log: {log})")
        for line in log.read_text().splitlines():
            if line.startswith("-- ldo: "):
                say(line.removeprefix("-- ldo: "))
        (module,) = made.glob("_C.*")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target.with_suffix(".part"))
        # replaced, not overwritten: a process that has loaded the old module keeps it
        os.replace(target.with_suffix(".part"), target)


def requested_cuda() -> str:
    """$LDO_CUDA: 0, 1 or auto."""
    cuda = os.environ.get("LDO_CUDA", "auto")
    if cuda not in ("0", "1", "auto"):
        raise CannotBuild(f"LDO_CUDA={cuda!r} is not one of 0, 1, auto")
    return cuda


def requested_architectures() -> str:
    """$LDO_CUDA_ARCHITECTURES: numbers separated by semicolons; empty: all."""
    architectures = os.environ.get("LDO_CUDA_ARCHITECTURES", "")
    if architectures and not re.fullmatch(r"\d+(;\d+)*", architectures):
        raise CannotBuild(f"LDO_CUDA_ARCHITECTURES={architectures!r} is not a number like 90, or several like 80;90")
    return architectures


def cmake_options(output: Path, nvcc: str | None, architectures: str) -> dict[str, object]:
    """The options for CMakeLists.txt; the module goes to ``output``."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 is not installed; pip install pybind11") from None
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "LDO_CUDA": "1" if nvcc else "0",
        "LDO_CUDA_ARCHITECTURES": architectures,
        "LDO_OUTPUT": output,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    if nvcc:
        options["CMAKE_CUDA_COMPILER"] = nvcc
    return options


def generator() -> list[str]:
    """CMake's flags for Ninja if it is installed, else for make."""
    ninja = shutil.which("ninja") or program("ninja")
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]


def chosen_nvcc(cuda: str) -> str | None:
    """The nvcc to build the CUDA part with, None to build without it; says which."""
    if cuda == "0":
        say("CUDA part: no, LDO_CUDA=0")
        return None
    nvcc = find_nvcc()
    if cuda == "1" and nvcc is None:
        raise CannotBuild("LDO_CUDA=1, but nvcc was not found on PATH, in $CUDACXX or in /usr/local/cuda")
    say(f"CUDA part: yes, {nvcc}" if nvcc else "CUDA part: no, nvcc was not found")
    return nvcc


def check_compiler() -> None:
    """Raise ``CannotBuild`` without a C++ compiler: CMake would say so in many lines."""
    compilers = (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise CannotBuild("no C++ compiler was found (c++, g++, clang++ or $CXX)")


def program(name: str) -> str | None:
    """A program that pip installed next to this interpreter, which need not be on PATH."""
    found = Path(sys.executable).parent / name
    return str(found) if found.exists() else None


def find_nvcc() -> str | None:
    """nvcc from $CUDACXX, PATH, $CUDA_HOME or the usual folder."""
    candidates = [os.environ.get("CUDACXX"), "nvcc"]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            candidates.append(f"{home}/bin/nvcc")
    for candidate in candidates:
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    return None


def reason(log: str) -> str:
    """What looks like the first error of a build log, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "error" in line.lower() and not line.startswith("--"):
            # "error:" by itself has its message on the next line
            count = 2 if line.endswith(":") else 1
            return " ".join(lines[number : number + count])[:300]
    return lines[-1] if lines else "no output"


setup(
    packages=[*find_packages(include=["ldo", "ldo.*"]), "ldo.kernels", "ldo.recipes"],
    package_dir={"ldo.kernels": "kernels", "ldo.recipes": "recipes"},
    package_data={
        "ldo.recipes": ["*.yaml", "*.txt"],
        "ldo.models.generator": ["published/*.json"],
        "ldo.report": ["templates/*"],
        "ldo.sandbox": ["thresholds.json", "models/**/*.json", "models/**/*.safetensors"],
    },
    ext_modules=[Extension("ldo._C", sources=[])],
    cmdclass={"build_ext": Build},
)
