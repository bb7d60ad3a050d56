"""What the documents name is there: files, modules to run, functions, recipe keys, links and their headings."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

from ldo.core.config import Recipe

ROOT = Path(__file__).resolve().parent.parent
# not CHANGELOG.md, which also names what was
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, *sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / ".github").rglob("*.md"))]
# a path from the repository's root; of a pattern, one file that matches is enough
PATH = re.compile(r"(?<![\w/-])(?:\.\./)*((?:ldo|kernels|csrc|recipes|docs|benchmarks|tests)/[\w.*/-]*)")
COMMAND = re.compile(r"\b(?:python|torchrun[^\n`]*?) -m ((?:ldo|benchmarks|tests)[\w.]*\w)")
DOTTED = re.compile(r"(?<![\w/.])((?:ldo|benchmarks)(?:\.\w+)+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
KEY = re.compile(r"(?<![\w/.])(model|world_model|data|lora|teacher|critic|gate|align|rl|evaluate)\.(\w+)")
SUFFIXES = ("json", "jsonl", "md", "py", "yaml")  # gate.json is a file
PLACEHOLDER = "NAME"  # stands for what the reader will choose


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def is_command(module: str) -> bool:
    """Can a module be run by ``python -m``?"""
    found = importlib.util.find_spec(module)
    is_package = found is not None and found.submodule_search_locations is not None
    return found is not None and (not is_package or importlib.util.find_spec(f"{module}.__main__") is not None)


@pytest.mark.parametrize("text", TEXTS, ids=relative)
def test_paths_exist(text):
    named = {path.rstrip(".") for path in PATH.findall(text.read_text()) if PLACEHOLDER not in path}
    missing = [path for path in sorted(named) if not any(ROOT.glob(path))]
    assert not missing


@pytest.mark.parametrize("text", TEXTS, ids=relative)
def test_commands_exist(text):
    assert not [module for module in sorted(set(COMMAND.findall(text.read_text()))) if not is_command(module)]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_dotted_names_can_be_imported(page):
    missing = []
    for name in sorted(set(DOTTED.findall(page.read_text()))):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("text", TEXTS, ids=relative)
def test_recipe_keys_exist(text):
    keys = {(section, key) for section, key in KEY.findall(text.read_text()) if key not in SUFFIXES}
    assert not [f"{section}.{key}" for section, key in sorted(keys) if not hasattr(getattr(Recipe(), section), key)]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


def test_the_check_sees_what_it_should():
    text = "see `ldo/core/config.py`, (../docs/a.md), kernels/. But a/ldo/x.py, and ldo.ops.relation_loss"
    assert [path.rstrip(".") for path in PATH.findall(text)] == ["ldo/core/config.py", "docs/a.md", "kernels/"]
    assert DOTTED.findall(text) == ["ldo.ops.relation_loss"]
    text = "torchrun --nproc-per-node 8 -m ldo.train x; `python -m ldo.report`."
    assert COMMAND.findall(text) == ["ldo.train", "ldo.report"]
    assert is_command("ldo.report") and is_command("ldo.train")
    assert not is_command("ldo.stages") and not is_command("ldo.nothing")
