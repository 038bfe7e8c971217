"""Imports only go down: parses every module of the package and fails on a reversed arrow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "megatron_muon"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# From the bottom up. A unit is a module or a subpackage of the package; it may import units of lower layers only.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("newton_schulz", "machines", "phases", "states", "nvml"),
    ("config", "matrices", "lockstep", "rounds", "kinds", "page", "checkpoints", "qk_clip"),
    ("shares", "team", "elements", "rounding", "splits"),
    ("split_file", "muon", "reference", "cost_model", "second_moment"),
    ("reference_variants",),
    ("assign", "ownership"),
    ("plan",),
    ("exchange",),
    ("pipeline", "metrics", "agreement"),
    ("timing",),
    ("optimizer",),
    ("megatron", "cpu"),
    ("planning", "report", "launch"),
    ("profile",),
    ("cli",),
    ("", "__main__"),  # "": the package's own __init__, with the public functions
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# Who may import Megatron whenever it is imported itself, and who only once a function of it is called.
IMPORTS_MEGATRON = frozenset({"megatron", "cpu"})
IMPORTS_MEGATRON_LAZILY = frozenset({"planning", "profile", "launch", "cli", "checkpoints", ""})


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


def unit(dotted: str, root: Path) -> str:
    """The module or subpackage of the package that a dotted name lies in; "" for the package itself."""
    first = [*dotted.split("."), ""][1]
    return first if (root / first).is_dir() or (root / f"{first}.py").is_file() else ""


def reversed_imports(root: Path) -> list[str]:
    """Imports within the package that do not go to a lower layer, and units that no layer names."""
    problems = []
    for found in imports(root):
        if found.target.split(".")[0] != root.name:
            continue
        source, target = unit(found.importer, root), unit(found.target, root)
        unknown = {source, target} - LEVEL.keys()
        if unknown:
            problems.append(f"{found}: no layer names {', '.join(sorted(unknown))}")
        elif source != target and LEVEL[target] >= LEVEL[source]:
            problems.append(str(found))
    return problems


def megatron_imports(root: Path) -> list[str]:
    """Imports of Megatron from where it is not allowed."""
    return [
        str(found)
        for found in imports(root)
        if found.target.split(".")[0] == "megatron"
        and (source := unit(found.importer, root)) not in IMPORTS_MEGATRON
        and (found.eager or source not in IMPORTS_MEGATRON_LAZILY)
    ]


def test_imports_only_go_down() -> None:
    assert reversed_imports(ROOT) == []


def test_every_unit_has_a_layer() -> None:
    """Also one that imports nothing and that nothing imports."""
    units = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert units - {"__init__"} <= LEVEL.keys()


def test_only_the_glue_imports_megatron() -> None:
    assert megatron_imports(ROOT) == []
    importers = {unit(found.importer, ROOT) for found in imports(ROOT) if found.target.split(".")[0] == "megatron"}
    # Were the parser blind, the line above would hold as well.
    assert {"megatron", "cpu"} <= importers


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    code = f"import sys, {PACKAGE}; print([m for m in ('torch', 'megatron', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def tree(directory: Path, **sources: str) -> Path:
    """A package named like ours, with empty modules but for `sources` (`a__b` is the module b of the package a)."""
    root = directory / PACKAGE
    for name in ("newton_schulz", "megatron", "cpu"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    for name in ("__init__", "config", "matrices", "muon", "plan", "exchange", "optimizer", "launch"):
        (root / f"{name}.py").touch()
    for name, source in sources.items():
        (root / f"{name.replace('__', '/', 1) if not name.startswith('__') else name}.py").write_text(source)
    return root


@pytest.mark.parametrize(
    "module, source",
    [
        ("muon", "from megatron_muon.optimizer import ShardedMuon"),
        ("muon", "import megatron_muon.plan"),
        ("muon", "from megatron_muon import config, exchange"),
        ("muon", "from .plan import build_plan"),
        ("muon", "from . import plan"),
        ("matrices", "from megatron_muon.config import MuonConfig"),  # of the same layer
        ("plan", "def f():\n    if True:\n        from megatron_muon.megatron import build"),
        ("plan", "if TYPE_CHECKING:\n    from megatron_muon.exchange import Exchange"),
        ("exchange", "import importlib\nimportlib.import_module('megatron_muon.optimizer')"),
        ("newton_schulz__cost", "from ..config import MuonConfig"),
        ("newton_schulz__cost", "from megatron_muon.matrices import MatrixSpec"),
        ("cpu__devices", "from megatron_muon.megatron import build"),
        ("megatron__build", "from megatron_muon.launch import main"),
        ("optimizer", "from megatron_muon import get_megatron_optimizer"),
        ("stray", "from megatron_muon.config import MuonConfig"),  # a module that no layer names
    ],
)
def test_detects_a_reversed_import(tmp_path: Path, module: str, source: str) -> None:
    problems = reversed_imports(tree(tmp_path, **{module: source}))
    assert len(problems) == 1
    assert problems[0].startswith(f"{PACKAGE}.{module.replace('__', '.')}:{source.count(chr(10)) + 1} imports")


@pytest.mark.parametrize(
    "module, source",
    [
        ("optimizer", "from megatron_muon.plan import OwnershipPlan\nfrom megatron_muon import muon"),
        ("newton_schulz__cost", "from megatron_muon.newton_schulz.coefficients import Schedule\nfrom . import cost"),
        ("config", "def f():\n    from megatron_muon.newton_schulz import coefficients"),
        ("megatron__build", "from megatron_muon.optimizer import ShardedMuon\nimport megatron.core"),
        ("__init__", "def f():\n    from megatron_muon.megatron import build"),
    ],
)
def test_accepts_imports_that_go_down(tmp_path: Path, module: str, source: str) -> None:
    root = tree(tmp_path, **{module: source})
    assert reversed_imports(root) == [] and megatron_imports(root) == []


@pytest.mark.parametrize(
    "module, source, allowed",
    [
        ("optimizer", "import megatron.core", False),
        ("optimizer", "def f():\n    from megatron.core import parallel_state", False),
        ("plan", "if TYPE_CHECKING:\n    from megatron.core.optimizer import OptimizerConfig", False),
        ("plan", "import importlib\nimportlib.import_module(f'megatron.{x}')", False),
        ("launch", "import megatron.core", False),
        ("launch", "class A:\n    import megatron.core", False),
        ("__init__", "try:\n    import megatron.core\nexcept ImportError:\n    pass", False),
        ("__init__", "if TYPE_CHECKING:\n    pass\nelse:\n    import megatron.core", False),
        ("launch", "def f():\n    import megatron.core", True),
        ("__init__", "if TYPE_CHECKING:\n    import megatron.core", True),
        ("cpu__devices", "import megatron.core", True),
    ],
)
def test_detects_a_megatron_import(tmp_path: Path, module: str, source: str, allowed: bool) -> None:
    assert len(megatron_imports(tree(tmp_path, **{module: source}))) == (0 if allowed else 1)
