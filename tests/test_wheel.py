"""The wheel: it holds the package and nothing else, and an environment with it alone has the commands."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    # From a copy, since setuptools writes into the tree that it builds.
    copy = directory / "source"
    copy.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith("megatron_muon/") or name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(directory), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = directory.glob("megatron_muon-*.whl")
    return built


def test_contents(wheel: Path) -> None:
    """Every file of the package, and none beside it."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "megatron_muon"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert names == set(filter(None, tracked.split("\0")))


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    hard = sorted(word.split(";")[0].split(">")[0].split("<")[0].strip() for word in required if "extra ==" not in word)
    assert {"megatron-core", "torch"} <= set(hard)
    assert any(line.startswith("Requires-Python: >=3.12") for line in lines)
    assert "Description-Content-Type: text/markdown" in lines


def test_installed_commands(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, to which this one lends the dependencies and not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for words in (["-m", "megatron_muon", "--help"], ["-m", "megatron_muon", "plan", "qwen3-8b", "--dp", "8"]):
        done = subprocess.run([python, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    located = [python, "-c", "import megatron_muon; print(megatron_muon.__file__)"]
    found = subprocess.run(located, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).is_relative_to(packages)
