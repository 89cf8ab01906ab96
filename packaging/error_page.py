"""Writes docs/errors.md: every error message of the package, read from the places that make it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "actsparse"
PAGE = ROOT / "docs" / "errors.md"
BASE = "ActsparseError"
LEFT_OUT = ("twins/train/",)
AREAS = {
    "cli": "The command line",
    "data": "Prompts, corpora, tasks",
    "models": "Models",
    "methods": "Methods and plans",
    "engine": "Engines",
    "core": "Numerics",
    "pipelines": "Commands at work",
    "store": "Run directories",
    "report": "Reports",
    "twins": "The shipped models",
}
SLOWER = "none needed: the next engine takes over, and names this as the reason"
HEAD = """# Errors

Made by `make errors` from the source. Every message says what happened to which object, and one hint what to do;
`<name>` and `…` stand for what is filled in, `a / b` for one of several. Exit code 1, but 3 for a missed quality gate,
2 for a command line that cannot be parsed, 130 after Ctrl-C or SIGTERM. `--debug` adds the stack trace and what a
library said. What was finished before an error is kept: start the same command again.
"""


def error_classes(trees: dict[str, ast.Module]) -> set[str]:
    """The names of ActsparseError and of every class below it."""
    parents = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {BASE}
    while more := {name for name, bases in parents.items() if bases & found} - found:
        found |= more
    return found


def text_of(node: ast.expr | None) -> str:
    """A message as it reads, with … for what is filled in."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        ways = [text_of(node.body), text_of(node.orelse)]
        return " / ".join(way for way in ways if way) if "" not in ways else f"[{''.join(ways)}]"
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value)
    if isinstance(node, ast.Name):
        return f"<{node.id}>"
    if isinstance(node, ast.Attribute):
        return f"<{node.attr}>"
    return "…"


def messages(tree: ast.Module, classes: set[str]) -> Iterator[tuple[str, str]]:
    """(message, way out) of every error that a module makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
            named = {word.arg: word.value for word in node.keywords}
            what = node.args[0] if node.args else named.get("what")
            hint = node.args[1] if len(node.args) > 1 else named.get("hint")
            if what is not None:
                yield text_of(what), text_of(hint)


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def page() -> str:
    """The whole page."""
    trees = {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith(LEFT_OUT)
    }
    classes = error_classes(trees)
    areas: dict[str, set[tuple[str, str]]] = {}
    for name, tree in trees.items():
        for what, hint in messages(tree, classes):
            if not hint and name.startswith("engine/"):
                hint = SLOWER
            if what.strip("… "):
                areas.setdefault(name.split("/")[0], set()).add((what, hint))
    parts = [HEAD]
    for area in [*AREAS, *sorted(areas.keys() - AREAS.keys())]:
        if area in areas:
            parts.append(f"\n## {AREAS.get(area, area)}\n\n| message | way out |\n|---|---|\n")
            parts += [f"| {cell(what)} | {cell(hint)} |\n" for what, hint in sorted(areas[area])]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
