"""The extension ldo._C, and the packages that do not sit where setuptools looks; all else is in pyproject.toml.

``python setup.py build_ext`` builds csrc/ in place through CMake and exits 1 if it cannot; ``pip install`` goes on without the
extension, since everything also runs as plain PyTorch. LDO_CUDA=0|1|auto: no CUDA part, one or an error, one if nvcc is found.
LDO_CUDA_ARCHITECTURES=90, or "80;90": only for GPUs of these compute capabilities, which builds faster; unset, for all that nvcc knows of
those in CMakeLists.txt.
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
    """To stderr, so that pip -v shows it in order."""
    print(f"ldo._C: {line}", file=sys.stderr, flush=True)


class Build(build_ext):
    """Has CMake build the module where setuptools wants it: in the tree for build_ext and editable installs, else in the wheel."""

    def finalize_options(self) -> None:
        if "build_ext" in sys.argv:  # asked for by name: in place, unless told where
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
            self.extensions = []
            return
        say(f"built in {time.monotonic() - began:.0f} s")

    def build_with_cmake(self, target: Path) -> None:
        """Configure and build in a folder of its own for each interpreter and choice of CUDA."""
        cuda = os.environ.get("LDO_CUDA", "auto")
        if cuda not in ("0", "1", "auto"):
            raise CannotBuild(f"LDO_CUDA={cuda!r} is not one of 0, 1, auto")
        architectures = os.environ.get("LDO_CUDA_ARCHITECTURES", "")
        if architectures and not re.fullmatch(r"\d+(;\d+)*", architectures):
            raise CannotBuild(f"LDO_CUDA_ARCHITECTURES={architectures!r} is not a number like 90, or several like 80;90")
        cmake = shutil.which("cmake") or program("cmake")
        if cmake is None:
            raise CannotBuild("cmake is not installed; pip install cmake ninja")
        try:
            import pybind11
        except ImportError:
            raise CannotBuild("pybind11 is not installed; pip install pybind11") from None
        if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
            raise CannotBuild("no C++ compiler was found (c++, g++, clang++ or $CXX)")
        nvcc = find_nvcc() if cuda != "0" else None
        if cuda == "1" and nvcc is None:
            raise CannotBuild("LDO_CUDA=1, but nvcc was not found on PATH, in $CUDACXX or in /usr/local/cuda")
        say(f"CUDA part: {f'yes, {nvcc}' if nvcc else 'no, LDO_CUDA=0' if cuda == '0' else 'no, nvcc was not found'}")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-cuda' if nvcc else ''}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # it may name tools of an environment that is gone
        made = build / "out"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "LDO_CUDA": "1" if nvcc else "0",
            "LDO_CUDA_ARCHITECTURES": architectures,
            "LDO_OUTPUT": made,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        ninja = shutil.which("ninja") or program("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        shutil.rmtree(made, ignore_errors=True)
        log = build / "build.log"
        with log.open("w") as out:
            for command in (
                [cmake, "-S", ROOT, "-B", build, *generator, *(f"-D{k}={v}" for k, v in options.items())],
                [cmake, "--build", build, "--parallel", str(os.cpu_count() or 2)],
            ):
                if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode:
                    raise CannotBuild(f"{reason(log.read_text())} (all of it: {log})")
        for line in log.read_text().splitlines():
            if line.startswith("-- ldo: "):
                say(line.removeprefix("-- ldo: "))
        (module,) = made.glob("_C.*")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target.with_suffix(".part"))
        os.replace(target.with_suffix(".part"), target)  # a process that has the old one loaded keeps it


def program(name: str) -> str | None:
    """A program that pip installed beside this interpreter, which need not be on PATH."""
    found = Path(sys.executable).parent / name
    return str(found) if found.exists() else None


def find_nvcc() -> str | None:
    """nvcc from $CUDACXX, PATH, $CUDA_HOME or the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next((p for c in (os.environ.get("CUDACXX"), "nvcc", *(f"{h}/bin/nvcc" for h in homes if h)) if c and (p := shutil.which(c))), None)


def reason(log: str) -> str:
    """What looks like the first error of a build log, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "error" in line.lower() and not line.startswith("--"):
            return " ".join(lines[number : number + (2 if line.endswith(":") else 1)])[:300]
    return lines[-1] if lines else "no output"


setup(
    packages=[*find_packages(include=["ldo", "ldo.*"]), "ldo.kernels", "ldo.recipes"],
    package_dir={"ldo.kernels": "kernels", "ldo.recipes": "recipes"},
    package_data={
        "ldo.recipes": ["*.yaml", "*.txt"],
        "ldo.generator": ["published/*.json"],
        "ldo.report": ["style.css"],
        "ldo.sandbox": ["thresholds.json", "models/**/*.json", "models/**/*.safetensors"],
    },
    ext_modules=[Extension("ldo._C", sources=[])],
    cmdclass={"build_ext": Build},
)
