"""Compile Triton kernels for GPUs that are not here, and read what the compiler made of them.

    specs = [aot.Spec("rows bf16", "ldo.kernels.residual:rows", {"x": "*bf16", "stride": "i32", "eps": "fp32"},
                      {"BLOCK": 1024}, divisible=("x", "stride"), warps=4)]
    usage = aot.compile_all(specs)
    usage["rows bf16", 90].registers

The compiler runs in processes of its own, because where TRITON_INTERPRET is set @triton.jit makes no kernels. What it
found is kept in ``KEPT``, under a hash of everything that it depends on: pytest's workers share it, and a later run
compiles only what has changed.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]

# Bytes that a block may have on sm_90 and sm_100; the compiler does not complain about more.
SHARED_LIMIT = 232_448
PROCESSES = 2
KEPT = ROOT / ".pytest_cache" / "ahead_of_time"


@dataclass(frozen=True)
class Spec:
    """One kernel as one launch would compile it.

    ``kernel``: "module:name" of a @triton.jit function, or of an autotuned one, of which the function is taken.
    ``signature``: type by parameter, in Triton's spelling: "*bf16", "i32", "i64", "fp32", or for a tensor descriptor
    made on the host "tensordesc<bf16[1, 128, 64]>". ``constants``: value by parameter, for constexprs and for whatever
    a launch specialises (an integer 1, a None). Every parameter is in one of the two. ``divisible``: parameters that
    launches promise to be multiples of 16, as Triton does for aligned pointers and sizes. ``options``: more of what
    launches pass, such as enable_fp_fusion.
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] = (80, 90, 100)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture: registers a thread, bytes a thread (``stack``) or block (``shared``).

    ``spills``: loads and stores of local memory in the machine code. ``opcodes``: how often each instruction occurs,
    with its modifiers ("LDG.E.128", "HGMMA.64x256x16.F32.BF16").
    """

    registers: int
    stack: int
    spills: int
    shared: int
    opcodes: Counter

    def count(self, opcode: str) -> int:
        """Instructions that are ``opcode`` or start with it and a modifier: count("LDG"), count("LDG.E.128")."""
        return sum(count for name, count in self.opcodes.items() if f"{name}.".startswith(f"{opcode}."))


def compile_all(specs: Sequence[Spec]) -> dict[tuple[str, int], Usage]:
    """Compile each spec for each of its architectures; usage by (name, architecture).

    AssertionError with the compiler's message if one fails.
    """
    assert len({spec.name for spec in specs}) == len(specs), "two specs of one name"
    kept = KEPT / _hash_of_the_sources()
    work = {}
    for spec in specs:
        for arch in spec.archs:
            digest = hashlib.sha256(repr(spec).encode()).hexdigest()
            work[spec.name, arch] = (asdict(spec), arch, kept / f"{digest}-{arch}")
    KEPT.mkdir(parents=True, exist_ok=True)
    # A worker that comes second waits for the first one's results: both cores compile for the first already.
    with FileLock(KEPT / "lock"):
        for other in KEPT.iterdir():
            if other.is_dir() and other != kept:
                shutil.rmtree(other)
        kept.mkdir(exist_ok=True)
        _run_the_compiler([item for item in work.values() if not item[2].exists()])
    return {key: Usage(**pickle.loads(path.read_bytes())) for key, (_, _, path) in work.items()}


def _hash_of_the_sources() -> str:
    """Of all kernels, since one calls the others; of this file, which reads the machine code; and of Triton."""
    found = hashlib.sha256(version("triton").encode())
    for path in (*sorted((ROOT / "kernels").glob("*.py")), Path(__file__)):
        found.update(path.read_bytes())
    return found.hexdigest()


def _run_the_compiler(work: Sequence[tuple[dict[str, Any], int, Path]]) -> None:
    """Compile (spec, architecture, file) and write each usage to its file."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for part in range(min(PROCESSES, len(work))):
            place = Path(folder) / str(part)
            place.mkdir()
            (place / "work").write_bytes(pickle.dumps(work[part::PROCESSES]))
            command = [sys.executable, __file__, str(place)]
            options = {
                "env": {**env, "TRITON_CACHE_DIR": str(place / "cache")},
                "stdout": subprocess.DEVNULL,
                "stderr": subprocess.PIPE,
                "text": True,
            }
            running.append(subprocess.Popen(command, **options))
        errors = [process.communicate()[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            assert process.returncode == 0, error[-4000:]


# ------------------------------------------------------------------------------------ in the compiling process


def _compile(spec: dict[str, Any], arch: int, folder: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = spec["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    types, constants = spec["signature"], spec["constants"]
    wrong = set(types) ^ (set(kernel.arg_names) - set(constants))
    assert not wrong and set(constants) <= set(kernel.arg_names), (
        f"signature and constants do not cover the parameters: {sorted(wrong)}"
    )
    source = ASTSource(
        kernel,
        {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names},
        constants,
        {(kernel.arg_names.index(parameter),): [["tt.divisibility", 16]] for parameter in spec["divisible"]},
    )
    options = {"num_warps": spec["warps"], "num_stages": spec["stages"], **spec["options"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    listing = _inspect(cubin)
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing))
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE))
    assert opcodes, "no machine code"
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "spills": sum(count for name, count in opcodes.items() if name.split(".")[0] in ("LDL", "STL")),
        "shared": max(compiled.metadata.shared, int(usage["SHARED"])),
        "opcodes": opcodes,
    }


def _inspect(cubin: Path) -> str:
    """The resources that a kernel takes, and its machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout


def main(folder: Path) -> None:
    for spec, arch, path in pickle.loads((folder / "work").read_bytes()):
        try:
            usage = _compile(spec, arch, folder)
        except Exception as error:
            raise RuntimeError(f"{spec['name']} for sm_{arch}: {error}") from error
        # Renamed when it is written: a file that has its name is whole.
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(usage))
        part.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
