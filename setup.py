"""Installs megatron_muon: Distributed Muon for NVIDIA Megatron-Core."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-muon",
    version="0.1.0",
    description="Distributed Muon inside Megatron-Core's DistributedOptimizer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_muon", "megatron_muon.*"]),
    package_data={"megatron_muon": ["py.typed", "megatron/model/*.yaml"]},
    python_requires=">=3.12",
    # psutil: Megatron-Core's checkpoint writer refuses to save without it, and does not ask for it itself.
    install_requires=["torch>=2.8", "megatron-core>=0.18.2,<0.21", "psutil>=5.9", "PyYAML>=6", "rich>=13"],
    extras_require={
        # What the examples need beyond the plugin: plots, fits and TensorBoard's event files.
        "demo": ["matplotlib>=3.8", "scipy>=1.13", "tensorboard>=2.16", "vl-convert-python>=1.9"],
        # NVML's counters, clocks and power; everything else of `megatron_muon.profile` works without.
        "profile": ["nvidia-ml-py>=12.570"],
        # The page of `megatron_muon report`: charts, and losses from TensorBoard's files.
        "report": ["tensorboard>=2.16", "vl-convert-python>=1.9"],
        "te": ["transformer-engine[core_cu13,pytorch]>=2.20,<3"],
        # `make docs`.
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1"],
        "kernels": ["emerging-optimizers>=0.3,<0.4"],
        # `python -m megatron_muon import`; Transformers loads what `export` writes.
        "huggingface": ["safetensors>=0.5", "transformers>=4.57"],
        "test": [
            *("einops>=0.8", "hypothesis>=6", "jsonschema>=4.18", "mypy>=1.15", "nvidia-ml-py>=12.570"),
            *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.17", "tensorboard>=2.16"),
            *("safetensors>=0.5", "transformers>=4.57", "vl-convert-python>=1.9"),
        ],
    },
)
