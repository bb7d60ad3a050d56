"""How readable the sources are, in numbers: ``python -m tests.helpers.measures [FOLDER ...]`` (default: ldo kernels).

Local names are the variables that a function's body binds, once a function; its parameters are not among them. A suffix
of shape letters (``frames_BTCHW``) does not count towards a name's length. Left out are letters of a formula that the
docstring of the function, its class or its module states: those that stand alone in a line with an equals sign.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
LONGEST_LINE = 120


@dataclass
class Measures:
    """What was counted over some files."""

    names: list[str] = field(default_factory=list)
    files: dict[Path, int] = field(default_factory=dict)  # lines of each
    comments: int = 0  # lines of comments that say something
    long_lines: list[str] = field(default_factory=list)

    @property
    def lines(self) -> int:
        return sum(self.files.values())

    @property
    def mean_length(self) -> float:
        return sum(map(len, self.names)) / len(self.names)

    @property
    def one_letter(self) -> float:
        return sum(len(name) == 1 for name in self.names) / len(self.names)


def formula_letters(docstring: str | None) -> set[str]:
    """Letters that stand alone in a docstring's lines with an equals sign."""
    formulas = [line for line in (docstring or "").splitlines() if "=" in line]
    return {letter for line in formulas for letter in re.findall(r"(?<![\w'])[a-zA-Z](?=[_\W]|$)", line)}


def body_names(function: FUNCTIONS) -> set[str]:
    """Variables that a function's own body binds."""
    names = set()
    todo = list(function.body) if isinstance(function.body, list) else [function.body]
    while todo:
        node = todo.pop()
        if isinstance(node, FUNCTIONS | ast.ClassDef):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        todo += ast.iter_child_nodes(node)
    return {name for name in names if name.strip("_")}


def local_names(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every function with each of its local names, less the letters of formulas."""

    def walk(node: ast.AST, letters: set[str]) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            letters = letters | formula_letters(ast.get_docstring(node))
        if isinstance(node, FUNCTIONS):
            for name in body_names(node):
                if name not in letters:
                    yield node, re.sub(r"_[A-Z0-9]+$", "", name)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, letters)

    return walk(tree, set())


def comment_lines(text: str) -> int:
    """Lines that hold nothing but a comment, less rules between sections and notes to the linter."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    alone = (token.string for token in tokens if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"))
    return sum(not comment.startswith(("# ---", "# noqa", "# fmt", "#!")) for comment in alone)


def measure(folders: list[str]) -> Measures:
    """The measures of all Python files in ``folders``, paths from the repository's root."""
    found = Measures()
    for folder in folders:
        path = ROOT / folder
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            text = file.read_text()
            found.files[file] = len(text.splitlines())
            found.names += [name for _, name in local_names(ast.parse(text))]
            found.comments += comment_lines(text)
            found.long_lines += [
                f"{file.relative_to(ROOT)}:{number}"
                for number, line in enumerate(text.splitlines(), 1)
                if len(line) > LONGEST_LINE
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.measures", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=["ldo", "kernels"])
    parser.add_argument("--names", action="store_true", help="list where the one-letter names are")
    args = parser.parse_args()
    found = measure(args.folders)
    print(f"files           {len(found.files)}, {found.lines / len(found.files):.0f} lines on average")
    print(f"longest         {max((lines, str(file.relative_to(ROOT))) for file, lines in found.files.items())}")
    print(f"local names     {found.mean_length:.2f} letters on average, {found.one_letter:.1%} are one letter")
    print(f"comments        {found.comments / found.lines:.1%} of lines")
    print(f"lines over {LONGEST_LINE}  {len(found.long_lines)}")
    print("shortest names ", Counter(name for name in found.names if len(name) <= 3).most_common(30))
    if args.names:
        for file in found.files:
            for function, name in local_names(ast.parse(file.read_text())):
                if len(name) == 1:
                    print(f"{file.relative_to(ROOT)}:{function.lineno} {getattr(function, 'name', 'lambda')}: {name}")


if __name__ == "__main__":
    main()
