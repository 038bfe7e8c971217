"""Start-up says which fused kernels Megatron will take, and names a partial installation instead of failing later."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_muon.megatron.entry import kernels
from megatron_muon.megatron.entry.kernels import check_fused_kernels

PACKAGES = ("transformer_engine", "apex", "amp_C")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of packages, in front of all others; the three packages are found there only."""
    monkeypatch.syspath_prepend(str(tmp_path))
    find_spec = kernels.importlib.util.find_spec

    def in_site(name: str) -> object:
        found = find_spec(name)
        place = getattr(found, "origin", None) or ""
        return found if name not in PACKAGES or place.startswith(str(tmp_path)) else None

    monkeypatch.setattr(kernels.importlib.util, "find_spec", in_site)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


def write(site: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


TE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/optimizers/__init__.py": "class FusedAdam: ...",
}
APEX = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: ..."}


def test_torch_where_there_is_neither(site: Path) -> None:
    assert check_fused_kernels() == check_fused_kernels(cpu=True) == "torch"


def test_transformer_engine_comes_first(site: Path) -> None:
    write(site, {**TE, **APEX, "amp_C.py": ""})
    assert check_fused_kernels() == "transformer_engine"


def test_apex_with_its_extensions(site: Path) -> None:
    write(site, {**APEX, "amp_C.py": ""})
    assert check_fused_kernels() == "apex"


@pytest.mark.parametrize(
    ("file", "text", "cause"),
    [
        # Core without the torch extension; a lone metapackage; packages of different versions.
        (
            "transformer_engine/pytorch/__init__.py",
            "raise FileNotFoundError('Could not find shared object file: torch')",
            "FileNotFoundError: Could not find shared object file: torch",
        ),
        (
            "transformer_engine/__init__.py",
            "raise RuntimeError('Found empty meta package')",
            "RuntimeError: Found empty",
        ),
        ("transformer_engine/__init__.py", "assert False, 'version mismatch'", "AssertionError: version mismatch"),
    ],
)
def test_partial_transformer_engine(
    site: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, cause: str
) -> None:
    write(site, {**TE, file: text})
    installed = {"transformer-engine": "2.20.2", "transformer-engine-cu13": "2.20.2"}
    monkeypatch.setattr(kernels, "_version", installed.get)
    with pytest.raises(RuntimeError) as raised:
        check_fused_kernels()
    message = str(raised.value)
    assert f"does not import ({cause}" in message
    assert "with transformer-engine 2.20.2, transformer-engine-cu13 2.20.2, without transformer-engine-torch" in message
    assert "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]'" in message
    assert message.endswith("pip uninstall transformer-engine transformer-engine-cu13")


@pytest.mark.parametrize("extension", [{}, {"amp_C.py": "raise ImportError('undefined symbol: _ZN2at')"}])
def test_apex_without_its_extensions(site: Path, extension: dict[str, str]) -> None:
    write(site, {**APEX, **extension})
    cause = "ImportError: undefined symbol" if extension else "ModuleNotFoundError: No module named 'amp_C'"
    with pytest.raises(RuntimeError, match=f"CUDA extensions do not import \\({cause}.*APEX_CUDA_EXT=1 pip install"):
        check_fused_kernels()


def test_the_other_apex(site: Path) -> None:
    """PyPI's, which is an authentication library: it is not imported to be told apart."""
    write(site, {"apex/__init__.py": "from pyramid_mailer.interfaces import IMailer", "apex/lib/__init__.py": ""})
    with pytest.raises(RuntimeError, match=r"another project of that name.*pip uninstall apex.*PyPI's apex is not it"):
        check_fused_kernels()
    assert "apex" not in sys.modules


@pytest.mark.parametrize("files", [TE, {**APEX, "amp_C.py": ""}])
def test_the_cpu_backend_refuses_kernels_of_cuda(site: Path, files: dict[str, str]) -> None:
    write(site, files)
    with pytest.raises(RuntimeError, match=r"expected none with the CPU backend.*use an environment without it"):
        check_fused_kernels(cpu=True)


def test_start_up_asks_before_megatron_is_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the seams that the launcher and `enable` install."""
    from megatron_muon.megatron.entry import seams

    write(site, {"apex/__init__.py": ""})
    monkeypatch.setattr(seams, "check_megatron_version", lambda: pytest.fail("Megatron was imported first"))
    with pytest.raises(RuntimeError, match="another project of that name"):
        seams.install_core_seams()


class TestDatasetHelper:
    """A helper that cannot be compiled is told before Megatron starts, with what is missing."""

    @pytest.fixture
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A source tree's directory of datasets, and a PATH with make, a compiler, python3 and python3-config alone."""
        datasets, programs = tmp_path / "datasets", tmp_path / "bin"
        datasets.mkdir()
        programs.mkdir()
        (datasets / "Makefile").write_text("helpers: helpers.cpp\n\ttouch helpers\n")
        (datasets / "helpers.cpp").write_text("")
        for name, text in (
            *(("g++", "exit 0"), ("python3", "echo -Ipybind11")),
            ("python3-config", f"echo {sysconfig.get_config_var('EXT_SUFFIX')}"),
        ):
            write_program(programs / name, text)
        make = shutil.which("make")
        assert make is not None
        (programs / "make").symlink_to(make)
        for name in ("sh", "touch"):
            (programs / name).symlink_to(str(shutil.which(name)))
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(kernels, "_datasets", lambda: datasets)
        return tmp_path

    def test_what_can_be_compiled_or_need_not_be(self, tree: Path) -> None:
        kernels.check_dataset_helper()
        subprocess.run(["make", "-C", str(tree / "datasets")], check=True, capture_output=True)
        (tree / "bin" / "python3").unlink()
        kernels.check_dataset_helper()
        # A wheel.
        (tree / "datasets" / "Makefile").unlink()
        kernels.check_dataset_helper()

    @pytest.mark.parametrize(
        ("program", "text", "message"),
        [
            ("make", None, "got no make on PATH; install make"),
            ("g++", None, r"got no C\+\+ compiler g\+\+ on PATH; install one, or set CXX"),
            (
                "python3",
                "exit 1",
                r"got no pybind11 in .*bin/python3, the first python3 on PATH; source .*/bin/activate",
            ),
            ("python3-config", None, "got no python3-config on PATH; install Python's development files"),
            ("python3-config", "echo .cpython-27.so", r"got a python3-config for \.cpython-27\.so, expected \.cpython"),
        ],
    )
    def test_what_is_missing(self, tree: Path, program: str, text: str | None, message: str) -> None:
        (tree / "bin" / program).unlink()
        if text is not None:
            write_program(tree / "bin" / program, text)
        with pytest.raises(RuntimeError, match=f"dataset helper in .*datasets cannot be compiled: {message}"):
            kernels.check_dataset_helper()

    def test_a_wheel_compiles_nothing(self, tree: Path) -> None:
        called: list[int] = []
        kernels.compile_helpers(lambda: called.append(1))
        assert called == [1]
        (tree / "datasets" / "Makefile").unlink()
        kernels.compile_helpers(lambda: called.append(2))
        assert called == [1]


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
