"""Makes an environment with another version of megatron-core, for `make test-versions`.

    python tests/make_version.py DIRECTORY VERSION_OR_ARCHIVE

It shares all other packages with the environment of the Python that runs this, so that it takes seconds. A version
comes from the package index; an archive is a source tree of Megatron-LM, whose helper for data sets is compiled here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path


def main(directory: Path, source: str) -> None:
    """Makes the environment, unless it is there already."""
    done = directory / ".installed"
    if done.exists() and done.read_text() == source:
        return
    venv.create(directory, clear=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))
    shared = Path(sysconfig.get_path("purelib"))
    # Appended to sys.path, so that the environment's own packages come first. `addsitedir` also runs the shared
    # environment's .pth files, such as that of this package's editable install.
    (packages / "zz_shared.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
    if source.endswith(".tar.xz"):
        _install_tree(Path(source), directory / "source", packages)
    else:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, f"megatron-core=={source}"], check=True)
    done.write_text(source)


def _install_tree(archive: Path, directory: Path, packages: Path) -> None:
    import torch

    with tarfile.open(archive) as tree:
        tree.extractall(directory, filter="data")
    (root,) = (path.resolve() for path in directory.iterdir())
    data = root / "megatron" / "core" / "datasets"
    # As in a wheel: the helper is compiled, and there is no Makefile, which would take another Python's headers.
    (data / "Makefile").unlink(missing_ok=True)
    headers = (sysconfig.get_path("include"), str(Path(torch.__file__).parent / "include"))  # torch's has pybind11
    helper = data / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = ["g++", "-O2", "-shared", "-std=c++17", "-fPIC", "-fvisibility=hidden", *(f"-I{h}" for h in headers)]
    subprocess.run([*compiler, str(data / "helpers.cpp"), "-o", str(helper)], check=True)
    (packages / "aa_megatron.pth").write_text(f"{root}\n")
    text = (root / "megatron" / "core" / "package_info.py").read_text()
    version = ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, flags=re.MULTILINE))
    metadata = packages / f"megatron_core-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
