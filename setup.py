"""Packaging of megagrow; tools are configured in pyproject.toml, exact pins in constraints.txt."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "megagrow/__init__.py").read_text("utf-8"), re.MULTILINE
)[1]
README = HERE / "README.md"


# Beside the package in a checkout, and inside it once it is installed.
SHIPPED = ("configs", "kernels/csrc")


class BuildPackage(build_py):
    """Put the configurations and the kernels' sources into the package; into an sdist as well."""

    def run(self):  # noqa: D102
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped().items():
                self.mkpath(os.path.dirname(target))
                self.copy_file(source, target, preserve_mode=False)

    def get_source_files(self):  # noqa: D102
        return [*super().get_source_files(), *self._shipped()]

    def get_outputs(self, include_bytecode=True):  # noqa: D102
        copied = [] if self.editable_mode else [*self._shipped().values()]
        return [*super().get_outputs(include_bytecode), *copied]

    def _shipped(self):
        """Where each file goes, by where it is."""
        paths = [p for top in SHIPPED for p in sorted(Path(top).rglob("*")) if p.is_file()]
        return {str(p): os.path.join(self.build_lib, "megagrow", p) for p in paths}


class BuildKernels(build_ext):
    """Compile the CUDA kernels where nvcc and a GPU build of PyTorch are; else say why not.

    Without them PyTorch's own ops serve.  MEGAGROW_CUDA=0 leaves them out, =1 insists.
    """

    def run(self):  # noqa: D102
        spec = importlib.util.spec_from_file_location("_build", HERE / "megagrow/ops/build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        print(build.optional_cuda_library())
        if build.CUDA_LIBRARY.exists() and not self.inplace:
            target = Path(self.build_lib, "megagrow/ops/lib", build.CUDA_LIBRARY.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(build.CUDA_LIBRARY, target)

    def get_outputs(self):  # noqa: D102
        return []

    def get_output_mapping(self):  # noqa: D102
        return {}

    def get_source_files(self):  # noqa: D102
        return []


# NVIDIA apex must never be listed here.  It is installed from its own sources; the package
# named `apex` on the package index is an unrelated project.  Nothing in megagrow needs it.
setup(
    name="megagrow",
    version=VERSION,
    description="Staged pretraining in which a language model grows while it trains",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megagrow", "megagrow.*"]),
    package_data={
        "megagrow": ["py.typed"],
        "megagrow.ops": ["*.json"],
    },
    entry_points={"console_scripts": ["megagrow = megagrow.cli.main:program"]},
    ext_modules=[Extension("megagrow.ops.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        # CRC-32 several times as fast as zlib's, which takes its place elsewhere.
        "isal>=1.7; platform_machine == 'x86_64' or platform_machine == 'aarch64'",
        "ninja",  # DeepSpeed compiles its communication ops on first use
        "numpy",
        "psutil",
        "pydantic>=2.11",
        "ruamel.yaml>=0.18.6,<0.20",
        "scipy",  # fits of scaling laws, the planner's optimum, Student's t of the savings
        "sentencepiece",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "benchmark": ["matplotlib"],  # draws the figures of the savings benchmark and of plans
        "dev": [
            "codespell",
            "coverage>=7.10",  # its patches for subprocesses and os._exit
            "datasets",  # writes what `megagrow prepare` reads
            "hypothesis",
            "matplotlib",
            # A real reader of our Megatron checkpoints; wheels are for Linux alone.
            "megatron-core; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "mkdocs-material",  # `make docs`; its successor Zensical reads mkdocs.yml as well
            "moto[server]",  # a local S3 server for the tests
            "mypy",
            "prometheus-client",
            "pyarrow",
            "pytest",
            "pytest-cov",
            "pytest-timeout",
            "pytest-xdist",
            "pyyaml",  # another reader of the YAML that is written
            "ruff",
            "s3fs",
            "safetensors",
            "tokenizers",
            "transformers",
            "types-PyYAML",
            "types-tqdm",
        ],
        "objects": ["fsspec", "s3fs"],  # checkpoints in object stores; gs:// needs gcsfs
        "telemetry": ["prometheus-client", "wandb"],
        # Hang detection by ft_launcher; wheels are for Linux alone.
        "resiliency": [
            "nvidia-resiliency-ext; sys_platform == 'linux' and platform_machine == 'x86_64'"
        ],
        "gpu": ["nvidia-ml-py"],  # what torch.cuda.utilization and power_draw read from
        "tables": ["pyarrow"],  # reads Parquet and Arrow files of text
        "zstd": ["zstandard"],  # reads .zst files of text
        "hf": ["safetensors", "tokenizers", "transformers"],
    },
)
