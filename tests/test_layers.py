"""Who may import whom, and what each package must leave to another."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import actsparse

PACKAGE = Path(actsparse.__file__).parent
RECORDS = {"results", "specs", "errors"}
NUMERIC = ["core", "models", "methods", "engine"]
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "specs": {"errors"},
    "results": {"specs", "errors"},
    "core": RECORDS,
    "models": {"core", "twins", *RECORDS},
    "methods": {"models", "core", *RECORDS},
    "engine": {"methods", "models", "core", *RECORDS},
    "data": RECORDS,
    "store": RECORDS,
    "report": {"store", *RECORDS},
    "pipelines": {"engine", "methods", "models", "core", "data", "store", *RECORDS},
    "cli": {"pipelines", "engine", "methods", "models", "core", "data", "store", "report", *RECORDS},
    "twins": {"errors"},
    "lm_eval_plugin": set(),
    "__main__": {"cli"},
}
TRAINING = "twins/train/"


@dataclass(frozen=True)
class Import:
    """One import of a source file; `parts` is the dotted name, with the imported name as its last part."""

    file: str
    line: int
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {'.'.join(self.parts)}"


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package but the code that trained the twins, parsed, by its path in the package."""
    found = {str(path.relative_to(PACKAGE)): ast.parse(path.read_bytes()) for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: tree for name, tree in found.items() if not name.startswith(TRAINING)}


def top(file: str) -> str:
    """The package or module right under `actsparse` that a file belongs to."""
    return Path(file).parts[0].removesuffix(".py")


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for file, tree in sources().items() for found in _imports_of(file, tree))


def _imports_of(file: str, tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, tuple(alias.name.split(".")))
        elif isinstance(node, ast.ImportFrom):
            above = ("actsparse", *Path(file).parts[: -node.level]) if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield Import(file, node.lineno, (*above, *module, alias.name))


@cache
def nodes() -> tuple[tuple[str, ast.expr], ...]:
    """Every name, attribute and call of the package, with its file."""
    kinds = (ast.Name, ast.Attribute, ast.Call)
    return tuple((file, node) for file, tree in sources().items() for node in ast.walk(tree) if isinstance(node, kinds))


def calls(name: str) -> list[str]:
    """Files and lines that name an attribute or variable `name`."""
    return [
        f"{file}:{node.lineno}"
        for file, node in nodes()
        if (isinstance(node, ast.Attribute) and node.attr == name) or (isinstance(node, ast.Name) and node.id == name)
    ]


def target(found: Import) -> str | None:
    """Which part of ours an import reaches; None for another's, and for the version."""
    if found.parts[0] != "actsparse" or found.parts[1:] in ((), ("__version__",)):
        return None
    return actsparse._HOME.get(found.parts[1], found.parts[1]).split(".")[0]


def test_the_walk_sees_the_package():
    assert len(sources()) > 60
    assert len(imports()) > 300
    assert {top(file) for file in sources()} - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_package_imports_only_what_the_table_allows(part):
    reached = [(found, target(found)) for found in imports() if top(found.file) == part]
    allowed = MAY_IMPORT[part] | {part, None}
    assert [str(found) for found, name in reached if name not in allowed] == []


def test_nothing_but_its_entry_imports_the_command_line():
    assert [str(f) for f in imports() if target(f) == "cli" and top(f.file) not in ("cli", "__main__")] == []


def test_the_packages_of_numerics_import_neither_tables_nor_figures_nor_data_sets():
    unwanted = {"polars", "plotly", "datasets", "pandas"}
    assert [str(f) for f in imports() if top(f.file) in NUMERIC and f.parts[0] in unwanted] == []


@pytest.mark.parametrize("part", ["report", "specs", "results", "errors", "cli"])
def test_torch_and_transformers_are_imported_nowhere_in(part):
    heavy = {"torch", "transformers", "accelerate", "datasets"}
    assert [str(f) for f in imports() if top(f.file) == part and f.parts[0] in heavy] == []


def test_only_taps_registers_hooks():
    names = {
        node.attr
        for _, node in nodes()
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and "hook" in node.attr
    }
    assert "register_forward_hook" in names
    assert {where.split(":")[0] for name in names for where in calls(name)} == {"models/taps.py"}


def test_only_the_clock_measures_time():
    clocks = [where for name in ("perf_counter", "perf_counter_ns", "process_time") for where in calls(name)]
    assert {where.split(":")[0] for where in clocks} == {"engine/clock.py"}
    assert {where.split(":")[0] for where in calls("monotonic")} <= {"pipelines/recording.py", "cli/output.py"}


def test_only_the_command_line_prints():
    printing = [
        f"{file}:{node.lineno}"
        for file, node in nodes()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    streams = [
        f"{file}:{node.lineno}"
        for file, node in nodes()
        if isinstance(node, ast.Attribute)
        and node.attr in ("stdout", "stderr")
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    ]
    assert [where for where in (*printing, *streams) if top(where) != "cli"] == []


def test_nothing_is_pickled():
    unsafe = {"pickle", "dill", "joblib", "cloudpickle", "shelve"}
    assert [str(f) for f in imports() if f.parts[0] in unsafe] == []
    assert [
        f"{file}:{node.lineno}"
        for file, node in nodes()
        if isinstance(node, ast.Attribute)
        and node.attr in ("save", "load")
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ] == []


@pytest.mark.parametrize("name", sorted(actsparse._HOME))
def test_every_public_name_has_the_module_that_it_is_promised_from(name):
    module = importlib.util.find_spec(f"actsparse.{actsparse._HOME[name]}")
    assert module is not None
    assert module.origin is not None
    defined = {getattr(node, "name", None) for node in ast.parse(Path(module.origin).read_bytes()).body}
    assert name in defined


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'profiles'"):
        _ = actsparse.profiles


HEAVY = ("torch", "transformers", "datasets", "plotly", "accelerate")
LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import actsparse", []),
        ("import actsparse; actsparse.ProfileSpec; actsparse.ActsparseError", []),
        ("from actsparse.cli.app import main; assert main(['--help']) == 0", []),
        ("from actsparse.cli.app import main; assert main(['evaluate', '--help']) == 0", []),
        ("import actsparse.report.build", ["plotly"]),
        ("import actsparse; actsparse.ProfileRun; actsparse.EvalRun", []),
    ],
)
def test_what_is_light_loads_nothing_heavy(code, loaded):
    done = subprocess.run([sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = ast.literal_eval(done.stdout.splitlines()[-1])
    assert set(found) <= set(loaded)


def test_the_package_lists_what_it_imports_lazily() -> None:
    import actsparse

    assert {"profile", "evaluate", "sparsify", "ProfileSpec"} <= set(dir(actsparse))
