"""Imports only go down: parses every module of the package and fails on a reversed arrow or a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT as REPOSITORY

PACKAGE = "megatron_muon"
ROOT = REPOSITORY / PACKAGE

# In the order in which a step passes them; a room may import rooms before it. "": the package's own `__init__`.
ROOMS = (
    *("newton_schulz", "state_keys", "config", "matrices", "rule", "plan", "exchange", "optimizer", "observe"),
    *("checkpoints", "megatron", "cpu", "estimate", "profile", "launch", "cli", "", "__main__"),
)
LEVEL = {room: level for level, room in enumerate(ROOMS)}
# Who may import Megatron whenever it is imported itself, and who only once a function of it is called.
IMPORTS_MEGATRON = frozenset({"megatron", "cpu"})
IMPORTS_MEGATRON_LAZILY = frozenset({"estimate", "profile", "launch", "cli", "checkpoints", ""})
# The same thing in several places: Megatron's function and what stands in for it, entry points, a list for each file.
SHARED_NAMES = frozenset({"__getattr__", "emulate_fp8", "get_megatron_optimizer", "main", "patches"})
# Modules at the root; everything else lives in a room that is a package.
LOOSE = frozenset({"__init__", "__main__", "cli", "config", "launch", "state_keys"})


@dataclass(frozen=True)
class Import:
    """`importer` (a dotted module) imports `target` in line `line`; `eager`: when it is itself imported."""

    importer: str
    target: str
    line: int
    eager: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(path: Path, root: Path) -> str:
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, eager: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `node`, with whether it runs when the module is imported."""
    for name, value in ast.iter_fields(node):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            is_type_checking(node) and name == "body"
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child, eager and not lazy
                yield from statements(child, eager and not lazy)


def targets(node: ast.AST, importer: str, is_package: bool) -> list[str]:
    """The dotted names that a node imports; `from a import b` gives a.b, since b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = importer.split(".")
            parents = parents[: len(parents) - node.level + is_package]
            base = ".".join([*parents, base] if base else parents)
        return [f"{base}.{alias.name}" for alias in node.names]
    called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
    if isinstance(node, ast.Call) and node.args and called in ("import_module", "__import__"):
        name = node.args[0]
        if isinstance(name, ast.JoinedStr) and name.values:
            name = name.values[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [name.value]
    return []


def imports(root: Path) -> list[Import]:
    found = []
    for path in sorted(root.rglob("*.py")):
        importer = module_name(path, root)
        for node, eager in statements(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            for target in targets(node, importer, path.name == "__init__.py"):
                found.append(Import(importer, target, getattr(node, "lineno", 0), eager))
    return found


def room(dotted: str, root: Path) -> str:
    """The room that a dotted name lies in; "" for the package itself."""
    first = [*dotted.split("."), ""][1]
    return first if (root / first).is_dir() or (root / f"{first}.py").is_file() else ""


def module(dotted: str, root: Path) -> str:
    """The module that a dotted name lies in: the name itself, or what it is an attribute of."""
    parts = dotted.split(".")[1:]
    while parts and not (root.joinpath(*parts).with_suffix(".py").is_file() or root.joinpath(*parts).is_dir()):
        parts.pop()
    return ".".join((root.name, *parts))


def reversed_imports(root: Path) -> list[str]:
    """Imports within the package that do not go to an earlier room, and rooms that are not listed."""
    problems = []
    for found in imports(root):
        if found.target.split(".")[0] != root.name:
            continue
        source, target = room(found.importer, root), room(found.target, root)
        unknown = {source, target} - LEVEL.keys()
        if unknown:
            problems.append(f"{found}: no room is called {', '.join(sorted(unknown))}")
        elif source != target and LEVEL[target] >= LEVEL[source]:
            problems.append(str(found))
    return problems


def circle(root: Path) -> list[str]:
    """Modules that import each other in a circle, lazy imports and those for type checking counted; [] if none do."""
    graph: dict[str, set[str]] = {}
    for found in imports(root):
        target = module(found.target, root)
        if found.target.split(".")[0] == root.name and target != found.importer:
            graph.setdefault(found.importer, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def megatron_imports(root: Path) -> list[str]:
    """Imports of Megatron from where it is not allowed."""
    return [
        str(found)
        for found in imports(root)
        if found.target.split(".")[0] == "megatron"
        and (source := room(found.importer, root)) not in IMPORTS_MEGATRON
        and (found.eager or source not in IMPORTS_MEGATRON_LAZILY)
    ]


def test_imports_only_go_down() -> None:
    assert reversed_imports(ROOT) == []


def test_no_module_imports_itself_through_others() -> None:
    assert circle(ROOT) == []


def test_every_module_has_a_room() -> None:
    """Also one that imports nothing and that nothing imports."""
    assert {p.stem for p in ROOT.glob("*.py")} == LOOSE
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"} == packages
    assert packages | LOOSE - {"__init__"} | {""} == LEVEL.keys()


def test_only_the_glue_imports_megatron() -> None:
    assert megatron_imports(ROOT) == []
    importers = {room(found.importer, ROOT) for found in imports(ROOT) if found.target.split(".")[0] == "megatron"}
    # Were the parser blind, the line above would hold as well.
    assert {"megatron", "cpu"} <= importers


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    code = f"import sys, {PACKAGE}; print([m for m in ('torch', 'megatron', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def tree(directory: Path, **sources: str) -> Path:
    """A package named like ours, with empty modules but for `sources` (`a__b` is the module b of the package a)."""
    root = directory / PACKAGE
    for name in ROOMS:
        if name and name not in LOOSE:
            (root / name).mkdir(parents=True)
            (root / name / "__init__.py").touch()
    for name in LOOSE:
        (root / f"{name}.py").touch()
    for name, source in sources.items():
        path = root / f"{name.replace('__', '/') if not name.startswith('__') else name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return root


@pytest.mark.parametrize(
    "importer, source",
    [
        ("rule__muon", "from megatron_muon.optimizer.step import Step"),
        ("rule__muon", "import megatron_muon.plan"),
        ("rule__muon", "from megatron_muon import config, exchange"),
        ("rule__muon", "from ..plan import build"),
        ("rule__muon", "from .. import plan"),
        ("plan__build", "def f():\n    if True:\n        from megatron_muon.megatron import optimizer"),
        ("plan__build", "if TYPE_CHECKING:\n    from megatron_muon.exchange import Exchange"),
        ("exchange__team", "import importlib\nimportlib.import_module('megatron_muon.optimizer')"),
        ("newton_schulz__cost", "from ..config import MuonConfig"),
        ("newton_schulz__cost", "from megatron_muon.matrices.spec import MatrixSpec"),
        ("cpu__devices", "from megatron_muon.launch import main"),
        ("megatron__model__routing", "from megatron_muon.cpu import devices"),
        ("optimizer__step", "from megatron_muon import get_megatron_optimizer"),
        ("stray", "from megatron_muon.config import MuonConfig"),  # a module without a room
    ],
)
def test_detects_a_reversed_import(tmp_path: Path, importer: str, source: str) -> None:
    problems = reversed_imports(tree(tmp_path, **{importer: source}))
    assert len(problems) == 1
    assert problems[0].startswith(f"{PACKAGE}.{importer.replace('__', '.')}:{source.count(chr(10)) + 1} imports")


@pytest.mark.parametrize(
    "importer, source",
    [
        ("optimizer__step", "from megatron_muon.plan.build import OwnershipPlan\nfrom megatron_muon import rule"),
        (
            "newton_schulz__cost",
            "from megatron_muon.newton_schulz.coefficients import Schedule\nfrom . import backends",
        ),
        ("config", "def f():\n    from megatron_muon.newton_schulz import coefficients"),
        ("megatron__optimizer__build", "from megatron_muon.optimizer.step import Step\nimport megatron.core"),
        ("__init__", "def f():\n    from megatron_muon.megatron.optimizer import build"),
    ],
)
def test_accepts_imports_that_go_down(tmp_path: Path, importer: str, source: str) -> None:
    root = tree(tmp_path, **{importer: source})
    assert reversed_imports(root) == [] and megatron_imports(root) == [] and circle(root) == []


@pytest.mark.parametrize(
    "back",
    [
        "from megatron_muon.plan.build import make",
        "def f():\n    from megatron_muon.plan import build",
        "if TYPE_CHECKING:\n    from megatron_muon.plan.build import Plan",
    ],
)
def test_detects_a_circle_inside_a_room(tmp_path: Path, back: str) -> None:
    root = tree(tmp_path, plan__build="from megatron_muon.plan.rounds import cut", plan__rounds=back)
    assert reversed_imports(root) == []
    assert set(circle(root)) == {f"{PACKAGE}.plan.build", f"{PACKAGE}.plan.rounds"}


@pytest.mark.parametrize(
    "importer, source, allowed",
    [
        ("optimizer__step", "import megatron.core", False),
        ("optimizer__step", "def f():\n    from megatron.core import parallel_state", False),
        ("plan__build", "if TYPE_CHECKING:\n    from megatron.core.optimizer import OptimizerConfig", False),
        ("plan__build", "import importlib\nimportlib.import_module(f'megatron.{x}')", False),
        ("launch", "import megatron.core", False),
        ("launch", "class A:\n    import megatron.core", False),
        ("__init__", "try:\n    import megatron.core\nexcept ImportError:\n    pass", False),
        ("__init__", "if TYPE_CHECKING:\n    pass\nelse:\n    import megatron.core", False),
        ("launch", "def f():\n    import megatron.core", True),
        ("__init__", "if TYPE_CHECKING:\n    import megatron.core", True),
        ("cpu__devices", "import megatron.core", True),
    ],
)
def test_detects_a_megatron_import(tmp_path: Path, importer: str, source: str, allowed: bool) -> None:
    assert len(megatron_imports(tree(tmp_path, **{importer: source}))) == (0 if allowed else 1)


def defined_names(root: Path) -> dict[str, list[str]]:
    """Public classes and functions of modules, each with the modules that define it."""
    out: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                out.setdefault(node.name, []).append(str(path.relative_to(root)))
    return out


def test_a_name_means_one_thing() -> None:
    repeated = {name: where for name, where in defined_names(ROOT).items() if len(where) > 1}
    assert {name: where for name, where in repeated.items() if name not in SHARED_NAMES} == {}


def test_detects_a_name_with_two_meanings(tmp_path: Path) -> None:
    root = tree(tmp_path, plan__build="class Row: ...\ndef f(): ...", rule__muon="class Row: ...\ndef _f(): ...")
    assert {name for name, where in defined_names(root).items() if len(where) > 1} == {"Row"}


def test_a_long_file_gives_its_reason() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    long = [path for path, text in texts.items() if text.count("\n") > 400]
    assert [path for path in long if "# More than 400 lines: " not in texts[path]] == []
