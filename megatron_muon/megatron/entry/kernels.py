"""Checks, before a run starts, that the compiled code that Megatron takes works.

Megatron takes FusedAdam (here: of the parameters that are not Muon's), gradient norms and scaling from Transformer
Engine where it finds the package, else from apex, else from torch. It also finds incomplete packages, which fail far
from the cause: while Megatron is imported, or when the optimizer is made.

Megatron's training loop also compiles a helper for datasets, with the `python3` that is first on PATH.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

Source = Literal["transformer_engine", "apex", "torch"]

_TE_DISTRIBUTIONS = ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13")
_TE_TORCH = "transformer-engine-torch"


def check_fused_kernels(*, cpu: bool = False) -> Source:
    """Finds the library that Megatron will take fused kernels from. Imports it, but not Megatron.

    Args:
        cpu: Whether this process trains on the CPU backend.

    Returns:
        The library.

    Raises:
        RuntimeError: If the library is there but cannot be used.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        _check_device("Transformer Engine", "transformer_engine", cpu)
        _check_transformer_engine()
        return "transformer_engine"
    found = importlib.util.find_spec("apex")
    if found is not None:
        _check_apex([Path(place) for place in found.submodule_search_locations or ()])
        _check_device("apex", "apex", cpu)
        return "apex"
    return "torch"


def _check_device(name: str, package: str, cpu: bool) -> None:
    if cpu:
        raise RuntimeError(
            f"{name}: got the package {package} in this environment, expected none with the CPU backend, since "
            "Megatron takes its kernels wherever it finds it and they need CUDA; use an environment without it"
        )


def _check_transformer_engine() -> None:
    try:
        # First: TE's libraries are linked against torch's.
        importlib.import_module("torch")
        importlib.import_module("transformer_engine.pytorch.optimizers")
    except Exception as error:  # what a partial installation raises depends on the part
        versions = {name: _version(name) for name in (*_TE_DISTRIBUTIONS, _TE_TORCH)}
        there = [f"{name} {found}" for name, found in versions.items() if found is not None]
        missing = [name for name in ("transformer-engine", _TE_TORCH) if versions[name] is None]
        raise RuntimeError(
            f"Transformer Engine: got an installation that does not import ({type(error).__name__}: {error}) with "
            f"{', '.join(there) or 'no distribution'}{''.join(f', without {name}' for name in missing)}, expected "
            "transformer-engine, its core (transformer-engine-cu12 or -cu13) and transformer-engine-torch in one "
            "version, or none of them; pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]', or "
            f"pip uninstall {' '.join(name for name, found in versions.items() if found) or 'transformer-engine'}"
        ) from error


def _check_apex(places: list[Path]) -> None:
    if not any((place / "optimizers").is_dir() for place in places):
        raise RuntimeError(
            f"apex: got another project of that name ({_version('apex') or 'no distribution'}, in "
            f"{', '.join(map(str, places)) or 'a single file'}), expected NVIDIA's or none; pip uninstall apex, and "
            "build NVIDIA's from its source tree if its kernels are wanted: PyPI's apex is not it"
        )
    try:
        importlib.import_module("torch")
        # The compiled part: without it apex imports, and its FusedAdam raises once it is made.
        importlib.import_module("amp_C")
        optimizers = importlib.import_module("apex.optimizers")
        optimizers.FusedAdam  # noqa: B018
    except Exception as error:
        raise RuntimeError(
            f"apex: got an installation whose CUDA extensions do not import ({type(error).__name__}: {error}), "
            "expected them or no apex; build it again with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install "
            "--no-build-isolation ., or pip uninstall apex: torch's AdamW then takes its place"
        ) from error


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def compile_helpers(original: Callable[[], None]) -> None:
    """The seam around the function that compiles the dataset helper: a wheel has it compiled, and no Makefile."""
    if (_datasets() / "Makefile").is_file():
        original()


def check_dataset_helper() -> None:
    """Checks that Megatron's training loop can compile its dataset helper, if it has to. Imports megatron.core.

    Raises:
        RuntimeError: If it cannot; says what is missing.
    """
    directory = _datasets()
    if not (directory / "Makefile").is_file():
        return
    try:
        # Whether the helper is there and newer than its source.
        if subprocess.run(["make", "-q", "-C", str(directory)], capture_output=True, check=False).returncode == 0:
            return
    except OSError:
        raise _no_helper(directory, "got no make on PATH; install make and a C++ compiler") from None
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise _no_helper(directory, f"got no C++ compiler {compiler} on PATH; install one, or set CXX")
    python = shutil.which("python3") or "python3"
    activate = f"source {sys.prefix}/bin/activate"
    if _output(python, "-m", "pybind11", "--includes") is None:
        pip = "pip install pybind11" if python == str(Path(sys.prefix) / "bin" / "python3") else activate
        raise _no_helper(directory, f"got no pybind11 in {python}, the first python3 on PATH; {pip}")
    suffix = _output("python3-config", "--extension-suffix")
    if suffix is None:
        raise _no_helper(directory, "got no python3-config on PATH; install Python's development files (python3-dev)")
    if suffix != sysconfig.get_config_var("EXT_SUFFIX"):
        expected = sysconfig.get_config_var("EXT_SUFFIX")
        raise _no_helper(directory, f"got a python3-config for {suffix}, expected {expected}; {activate}")


def _datasets() -> Path:
    spec = importlib.util.find_spec("megatron.core.datasets")
    assert spec is not None and spec.submodule_search_locations, "megatron.core has no datasets"
    return Path(spec.submodule_search_locations[0])


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _no_helper(directory: Path, problem: str) -> RuntimeError:
    return RuntimeError(f"Megatron's dataset helper in {directory} cannot be compiled: {problem}")
