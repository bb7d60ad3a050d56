"""Compile Triton kernels for GPUs that are not here, and read what the compiler made of them.

    specs = [aot.Spec("rows bf16", "ldo.kernels.residual:rows", {"x": "*bf16", "stride": "i32", "eps": "fp32"},
                      {"BLOCK": 1024}, divisible=("x", "stride"), warps=4)]
    usage = aot.compile_all(specs)
    usage["rows bf16", 90].registers

The compiler runs in processes of its own, because where TRITON_INTERPRET is set @triton.jit makes no kernels, and with
an empty cache, because a test must see the source as it is now.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = 232_448  # bytes a block may have on sm_90 and sm_100; the compiler does not mind more
PROCESSES = 2


@dataclass(frozen=True)
class Spec:
    """One kernel as one launch would compile it.

    ``kernel``: "module:name" of a @triton.jit function, or of an autotuned one, of which the function is taken.
    ``signature``: type by parameter, in Triton's spelling: "*bf16", "i32", "i64", "fp32", or for a tensor descriptor made on
    the host "tensordesc<bf16[1, 128, 64]>". ``constants``: value by parameter, for constexprs and for whatever a launch
    specialises (an integer 1, a None). Every parameter is in one of the two. ``divisible``: parameters that launches promise
    to be multiples of 16, as Triton does for aligned pointers and sizes. ``options``: more of what launches pass, such as
    enable_fp_fusion.
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

    ``spills``: loads and stores of local memory in the machine code. ``opcodes``: how often each instruction occurs, with
    its modifiers ("LDG.E.128", "HGMMA.64x256x16.F32.BF16").
    """

    registers: int
    stack: int
    spills: int
    shared: int
    opcodes: Counter

    def count(self, opcode: str) -> int:
        """Instructions that are ``opcode`` or start with it and a modifier: count("LDG"), count("LDG.E.128")."""
        return sum(n for name, n in self.opcodes.items() if f"{name}.".startswith(f"{opcode}."))


def compile_all(specs: Sequence[Spec]) -> dict[tuple[str, int], Usage]:
    """Compile each spec for each of its architectures; usage by (name, architecture). AssertionError with the compiler's words."""
    assert len({s.name for s in specs}) == len(specs), "two specs of one name"
    work = [(asdict(s), arch) for s in specs for arch in s.archs]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    result = {}
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
            running.append((place, subprocess.Popen(command, **options)))
        errors = [process.communicate()[1] for _, process in running]
        for (place, process), error in zip(running, errors, strict=True):
            assert process.returncode == 0, error[-4000:]
            result.update(pickle.loads((place / "usage").read_bytes()))
    return {key: Usage(**values) for key, values in result.items()}


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
    assert not wrong and set(constants) <= set(kernel.arg_names), f"signature and constants do not cover the parameters: {sorted(wrong)}"
    source = ASTSource(
        kernel,
        {p: types.get(p, "constexpr") for p in kernel.arg_names},
        constants,
        {(kernel.arg_names.index(p),): [["tt.divisibility", 16]] for p in spec["divisible"]},
    )
    options = {"num_warps": spec["warps"], "num_stages": spec["stages"], **spec["options"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _inspect("-res-usage", cubin)))
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", _inspect("-sass", cubin), re.MULTILINE))
    assert opcodes, "no machine code"
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "spills": sum(n for name, n in opcodes.items() if name.split(".")[0] in ("LDL", "STL")),
        "shared": max(compiled.metadata.shared, int(usage["SHARED"])),
        "opcodes": opcodes,
    }


def _inspect(what: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def main(folder: Path) -> None:
    usage = {}
    for spec, arch in pickle.loads((folder / "work").read_bytes()):
        try:
            usage[spec["name"], arch] = _compile(spec, arch, folder)
        except Exception as error:
            raise RuntimeError(f"{spec['name']} for sm_{arch}: {error}") from error
    (folder / "usage").write_bytes(pickle.dumps(usage))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
