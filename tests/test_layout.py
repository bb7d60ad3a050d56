"""House rules: a folder is a floor, a name is given once, files are readable, a wheel holds what a checkout does."""

import ast
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.measures import measure

ROOT = Path(__file__).resolve().parent.parent
# The top level of ldo/ and every __main__.py are commands; below them, a folder imports only from folders to its right.
FLOORS = ("commands", "stages", "run", "memory", "report", "method", "sandbox", "models", "data", "ops", "core")


def modules() -> dict[str, Path]:
    """Every module of the package but the kernels, which import nothing of it."""
    paths = sorted((ROOT / "ldo").rglob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: path for name, path in names.items() if name not in ("ldo", "ldo.kernels")}


MODULES = modules()


def floor(module: str) -> str:
    """The folder that a module belongs to."""
    parts = module.split(".")
    return "commands" if parts[-1] == "__main__" or parts[1] not in FLOORS else parts[1]


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def test_a_folder_is_a_floor():
    """Imports run down: from a folder only to itself and to those below it."""
    assert {path.name for path in (ROOT / "ldo").iterdir() if (path / "__init__.py").exists()} == set(FLOORS[1:])
    up = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imports(path)
        if FLOORS.index(floor(other)) < FLOORS.index(floor(module)) or (floor(other) == "commands" != module)
    ]
    assert not up


def test_no_imports_in_a_circle():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    # a package's __init__ is imported with any of its modules; that it names them is no circle
    graph = {
        module: {other for other in others if not module.startswith(f"{other}.")} for module, others in graph.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' > '.join(error.args[1])}")


def public_names(path: Path):
    """Functions, classes and constants of a file's top level, but for a command's main and a module's log."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_") and name not in ("main", "log"))


def test_no_two_public_things_have_one_name():
    homes = defaultdict(list)
    for path in [*MODULES.values(), *(ROOT / "kernels").glob("*.py")]:
        for name in public_names(path):
            homes[name].append(str(path.relative_to(ROOT)))
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert not twice


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def python(code: str, folder: Path, **environment: str) -> str:
    command, env = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_import_kernels_is_not_ours():
    """From the repository's root ``import kernels`` gives Hugging Face's package if installed, never our folder."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s and s.origin else None)"
    assert not python(code, ROOT).startswith(str(ROOT / "kernels"))
    fake = "import sys, types; m = types.ModuleType('x'); import ldo.kernels.support as s; print(s.__file__)"
    assert python(fake, ROOT) == str(ROOT / "kernels" / "support.py")


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'hub'")
    code = "import kernels, ldo.kernels.support as s; print(kernels.name, s.__file__)"
    assert python(code, ROOT, PYTHONPATH=str(tmp_path)) == f"hub {ROOT / 'kernels' / 'support.py'}"


@pytest.mark.slow
def test_a_wheel_holds_what_a_checkout_does(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site"], check=True)
    code = (
        "import sys; sys.path.insert(0, 'site'); import ldo, ldo.kernels.support as s, ldo.train, ldo.core.config as "
        "c; "
        "from ldo.sandbox import shipped as d, measure as m; from ldo.ops import extension as e; "
        "from ldo.models.generator import published as p; from ldo.report.render import render_template as r; "
        "print(s.__file__, c.DEFAULT_RECIPE.is_file(), d.GENERATOR.is_dir(), bool(m.thresholds()), "
        "bool(p.published_names()), 'Not run' in r('gate.html', gate=None), e.load()[0] is not None)"
    )
    buildable = any(shutil.which(c) for c in ("c++", "g++", "clang++"))
    out = python(code, tmp_path)
    assert out == f"{tmp_path / 'site' / 'ldo' / 'kernels' / 'support.py'} True True True True True {buildable}"
    templates = {file.name for file in (ROOT / "ldo" / "report" / "templates").iterdir()}
    assert templates == {file.name for file in (tmp_path / "site" / "ldo" / "report" / "templates").iterdir()}


def test_everything_imports_without_triton():
    """PyTorch brings Triton only on Linux with CUDA; elsewhere every operation has a form in plain PyTorch."""
    modules = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "ldo").rglob("*.py")]
    names = sorted(".".join(module.parts).removesuffix(".__init__") for module in modules)
    code = "import importlib as i, sys; sys.modules['triton'] = None; [i.import_module(name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, check=True)


def test_files_are_short():
    """Under 150 lines on average, and none over 400."""
    sources = measure(["ldo", "kernels"])
    assert sources.lines / len(sources.files) < 150
    everything = measure(["ldo", "kernels", "benchmarks", "tests", "setup.py"])
    long = [str(file.relative_to(ROOT)) for file, lines in everything.files.items() if lines > 400]
    assert not long, f"over 400 lines: {long}"


def test_names_are_words_and_comments_say_why():
    """Measured as ``python -m tests.helpers.measures`` prints it."""
    sources = measure(["ldo", "kernels"])
    assert sources.mean_length >= 6, f"local names have {sources.mean_length:.2f} letters on average"
    assert sources.one_letter < 0.12, f"{sources.one_letter:.1%} of local names are one letter"
    assert sources.comments / sources.lines >= 0.03, f"{sources.comments / sources.lines:.1%} of lines are comments"
