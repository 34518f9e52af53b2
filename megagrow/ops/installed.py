"""Which other libraries of fused kernels are installed; looking imports none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path


def apex_installed() -> bool:
    """Whether NVIDIA apex is here, with its CUDA extensions.

    The package named ``apex`` on the package index is an unrelated project, so that name proves
    nothing: apex is known by its extension ``amp_C``, or by its module ``apex.optimizers``.
    """
    return _found("amp_C") or _found("apex", "optimizers")


def transformer_engine_installed() -> bool:
    """Whether NVIDIA Transformer Engine is here, with its PyTorch part."""
    return _found("transformer_engine", "pytorch")


def liger_installed() -> bool:
    """Whether Liger-Kernel (Triton) is here."""
    return _found("liger_kernel", "ops")


def _found(package: str, module: str | None = None) -> bool:
    """Whether a package, or a module directly in it, can be imported; nothing of it is run."""
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
