"""NVIDIA apex, Transformer Engine and Liger as alternatives to megagrow's kernels.

A library is used only if it is installed, selected by `ops.backend`, and passes a numerical check
against fp64 when it is selected; it then handles the ops that it has, and megagrow's kernels the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.errors import ConfigError
from megagrow.ops import installed

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, in the 2-norm


@dataclass(frozen=True)
class Backend:
    """A library of kernels.

    Attributes:
        name: its name in `ops.backend`.
        installed: whether it is installed.
        functions: its ops, with the signatures of `PLAIN`.
        fix: how to install it.
        device: the device type it runs on.
    """

    name: str
    installed: Callable[[], bool]
    functions: Mapping[str, Callable[..., Any]]
    fix: str
    device: str = "cuda"


# --- the libraries' own calls ---------------------------------------------------------------


def _apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, tuple(weight.shape), eps)


def _apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight, bias, tuple(weight.shape), eps)


def _apex_adamw(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    import amp_C

    overflow = torch.zeros(1, dtype=torch.int32, device=parameter.device)
    tensors = [[gradient], [parameter], [exp_avg], [exp_avg_sq]]
    decoupled, correct_bias = 1, 1
    amp_C.multi_tensor_adam(
        2048 * 32, overflow, tensors, lr, *betas, eps, step, decoupled, correct_bias, weight_decay
    )


@lru_cache(maxsize=64)
def _transformer_engine_norm(kind: str, width: int, eps: float, dtype: torch.dtype) -> Any:
    import transformer_engine.pytorch as te

    return getattr(te, kind)(width, eps=eps, params_dtype=dtype)


def _transformer_engine_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    module = _transformer_engine_norm("RMSNorm", weight.numel(), eps, x.dtype)
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def _transformer_engine_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    module = _transformer_engine_norm("LayerNorm", weight.numel(), eps, x.dtype)
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Offset 0, statistics in fp32, and the incoming gradient is not modified.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, eps)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # It overwrites its inputs, so it is given copies.
    return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())


BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "apex",
            installed.apex_installed,
            {"rms_norm": _apex_rms_norm, "layer_norm": _apex_layer_norm, "adamw": _apex_adamw},
            "install NVIDIA apex from its sources (the package named apex on the index is an "
            "unrelated one)",
        ),
        Backend(
            "transformer_engine",
            installed.transformer_engine_installed,
            {
                "rms_norm": _transformer_engine_rms_norm,
                "layer_norm": _transformer_engine_layer_norm,
            },
            "pip install --no-build-isolation 'transformer_engine[pytorch]'",
        ),
        Backend(
            "liger",
            installed.liger_installed,
            {"rms_norm": _liger_rms_norm, "layer_norm": _liger_layer_norm, "swiglu": _liger_swiglu},
            "pip install liger-kernel",
        ),
    )
}


# --- the choice -----------------------------------------------------------------------------

_chosen: Backend | None = None


def choose(name: str) -> None:
    """Select a library for the ops it has (``own``: none), for this process.

    Raises:
        ConfigError: it is not installed, has no suitable device, or fails the numerical check.
    """
    global _chosen
    if name == "own":
        _chosen = None
        return
    backend = BACKENDS[name]
    if _chosen is backend:
        return
    if not backend.installed():
        raise ConfigError(
            f"ops.backend: {name} is not installed",
            expected="an installed library, since it was chosen",
            fix=f"{backend.fix}; or set ops.backend=own",
        )
    if backend.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"ops.backend: {name} needs a CUDA device", fix="set ops.backend=own"
        )  # fmt: skip
    for op in backend.functions:
        fault = self_check(backend, op)
        if fault is not None:
            raise ConfigError(
                f"ops.backend: {name} fails the numerical check of {op}",
                found=fault,
                expected="agreement with fp64",
                fix=f"install another version of {name}, or set ops.backend=own",
            )
    _chosen = backend


def alternative(op: str, x: Tensor) -> Callable[..., Any] | None:
    """The selected library's function for an op on a tensor like x, or None."""
    if _chosen is None or x.device.type != _chosen.device:
        return None
    return _chosen.functions.get(op)


def chosen() -> str:
    """The name of the selected library, or ``own``."""
    return "own" if _chosen is None else _chosen.name


# --- the numerical check --------------------------------------------------------------------


def _plain_adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr: float, betas: tuple[float, float],
    eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
    p.sub_(lr / (1 - betas[0] ** step) * m / denominator)


PLAIN: Mapping[str, Callable[..., Any]] = {
    "rms_norm": lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
    "layer_norm": lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "adamw": _plain_adamw,
}
_NUMBERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
}
_SHAPES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "rms_norm": ((37, 256), (256,)),
    "layer_norm": ((37, 256), (256,), (256,)),
    "swiglu": ((37, 256), (37, 256)),
    "adamw": ((1001,), (1001,), (1001,), (1001,)),
}


def self_check(backend: Backend, op: str) -> str | None:
    """Compare a library's op and its gradients with fp64; returns what is wrong, or None."""
    for dtype, tolerance in _TOLERANCE.items():
        if op == "adamw" and dtype != torch.float32:
            continue
        generator = torch.Generator().manual_seed(0)
        inputs = [
            torch.randn(shape, generator=generator).abs_().to(dtype) for shape in _SHAPES[op]
        ]  # fmt: skip
        low = [x.to(backend.device) for x in inputs]
        high = [x.to(backend.device, torch.float64) for x in inputs]
        try:
            ours = _results(op, backend.functions[op], low)
        except Exception as error:  # a third-party library may fail in any way
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for got, wanted in zip(ours, _results(op, PLAIN[op], high), strict=True):
            if got.shape != wanted.shape:
                return f"shape {tuple(got.shape)} instead of {tuple(wanted.shape)} in {dtype}"
            error_ = (got.double() - wanted).norm() / wanted.norm()
            if not error_ <= tolerance:
                return f"relative error {float(error_):.1e} in {dtype}"
    return None


def _results(op: str, function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of an op, or the tensors after an update."""
    if op == "adamw":
        tensors = [x.clone() for x in inputs]
        function(*tensors, **_NUMBERS[op])
        return [tensors[0], tensors[2], tensors[3]]
    leaves = [x.clone().requires_grad_() for x in inputs]
    more = () if op == "swiglu" else (1e-5,)
    y = function(*leaves, *more)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]
