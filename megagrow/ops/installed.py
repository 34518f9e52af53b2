"""Detects other libraries of fused kernels without importing them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path


def apex_installed() -> bool:
    """Whether NVIDIA apex is installed, with its CUDA extensions.

    The package named ``apex`` on the package index is an unrelated project, so the name alone is
    not evidence: apex is recognised by its extension ``amp_C``, or by its module
    ``apex.optimizers``.
    """
    return _found("amp_C") or _found("apex", "optimizers")


def transformer_engine_installed() -> bool:
    """Whether NVIDIA Transformer Engine is installed, with its PyTorch part."""
    return _found("transformer_engine", "pytorch")


def liger_installed() -> bool:
    """Whether Liger-Kernel (Triton) is installed."""
    return _found("liger_kernel", "ops")


def _found(package: str, module: str | None = None) -> bool:
    """Whether a package, or a module directly in it, can be imported; none of its code is run."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None or module is None:
        return spec is not None
    folders: Sequence[str] = spec.submodule_search_locations or ()
    return any(
        (Path(folder) / module / "__init__.py").exists() or (Path(folder) / f"{module}.py").exists()
        for folder in folders
    )
