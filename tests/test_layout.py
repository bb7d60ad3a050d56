"""The house rules: floors of imports, the kernels' import name, file sizes, and what a wheel holds."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    (
        "rng config checkpoint progress loggers metrics distributed video flow kernels world_model sandbox.simulate generator.folder report.charts "
        "ops.dispatch ops.extension generator.published live"
    ),
    (
        "cache buckets lora generator.protocol sandbox.scenes sandbox.observe update objectives "
        "attention switches "
        "ops ops.relation ops.residual ops.advantage ops.surrogate ops.native"
    ),
    "data",
    "hub generator.base sandbox.corrupt sandbox.measure teacher critic report report.page report.surprise",
    "generator.wan generator.cogvideox generator.hunyuan generator.ltx generator sandbox.dataset",
    "rollout meta",
    "passes",
    "memory",
    "budget",
    "check run gate",
    "selfmode evaluate score",
    "encode",
    "align",
    "reinforce figure",
    "qualify",
    "train sandbox.build",
    "sandbox.study",
]
FLOOR = {module: level for level, names in enumerate(FLOORS) for module in names.split()}


def modules():
    for path in sorted((ROOT / "ldo").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "ldo").with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")
        if name and not name.endswith("__main__"):
            yield name, path


def home(name: str) -> str:
    """The module of FLOORS that a name belongs to."""
    while name and name not in FLOOR:
        name = name.rpartition(".")[0]
    return name


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ldo":
            base = node.module.removeprefix("ldo").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".strip(".")
                yield full if home(full) == full or not base else base


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_room_imports_only_from_floors_below(name, path):
    if name == "sandbox":
        return
    own = home(name)
    assert own, f"{name} has no floor; give it one"
    for other in imports(path):
        target = home(other)
        if target and target != own:
            assert FLOOR[target] < FLOOR[own] or (FLOOR[target] == FLOOR[own] and not reaches(target, own)), f"{name} imports {other}"


def reaches(start: str, goal: str) -> bool:
    """Does ``start`` import ``goal``, directly or through its floor?"""
    seen, todo = set(), [start]
    table = {home(n): p for n, p in modules()}
    while todo:
        here = todo.pop()
        if here == goal:
            return True
        if here in seen or here not in table:
            continue
        seen.add(here)
        todo += [home(o) for o in imports(table[here]) if home(o)]
    return False


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def python(code: str, folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_import_kernels_is_not_ours():
    """From the repository's root ``import kernels`` gives Hugging Face's package where it is installed, never our folder."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s and s.origin else None)"
    assert not python(code, ROOT).startswith(str(ROOT / "kernels"))
    fake = "import sys, types; m = types.ModuleType('x'); import ldo.kernels.support as s; print(s.__file__)"
    assert python(fake, ROOT) == str(ROOT / "kernels" / "support.py")


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'hub'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, ldo.kernels.support as s; print(kernels.name, s.__file__)"
    assert python(code, ROOT) == f"hub {ROOT / 'kernels' / 'support.py'}"


@pytest.mark.slow
def test_a_wheel_holds_what_a_checkout_does(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site"], check=True)
    code = (
        "import sys; sys.path.insert(0, 'site'); import ldo, ldo.kernels.support as s, ldo.train as t; "
        "from ldo.sandbox import dataset as d, measure as m; from ldo.ops import extension as e; from ldo.generator import published as p; "
        "print(s.__file__, t.DEFAULT.is_file(), d.GENERATOR.is_dir(), bool(m.thresholds()), bool(p.names()), e.load()[0] is not None)"
    )
    buildable = any(shutil.which(c) for c in ("c++", "g++", "clang++"))
    out = python(code, tmp_path)
    assert out == f"{tmp_path / 'site' / 'ldo' / 'kernels' / 'support.py'} True True True True {buildable}"


def test_files_are_readable():
    long = [str(p.relative_to(ROOT)) for folder in ("ldo", "kernels") for p in (ROOT / folder).rglob("*.py") if len(p.read_text().splitlines()) > 400]
    assert not long, f"over 400 lines: {long}"
