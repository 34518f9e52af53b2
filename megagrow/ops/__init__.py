"""The public fused ops, called by the model and the optimizer, independent of the backend.

Each function uses megagrow's kernel if it is active (`library.own`), else the library selected by
`ops.backend` (`third_party`), else PyTorch's own op, which is always used for training on a CPU.
"""

from megagrow.ops.adamw import YoungBox, adamw_, adamw_serves, young_rates, young_table
from megagrow.ops.dispatch import (
    BOX_AXES,
    add_layer_norm,
    add_rms_norm,
    bias_gelu,
    copy_boxes_,
    cross_entropy_backward,
    layer_norm,
    rms_norm,
    rotary_,
    softmax_stats,
    swiglu,
)
from megagrow.ops.library import active, own, using
from megagrow.ops.third_party import choose

__all__ = [
    "BOX_AXES",
    "YoungBox",
    "active",
    "adamw_",
    "adamw_serves",
    "add_layer_norm",
    "add_rms_norm",
    "bias_gelu",
    "choose",
    "copy_boxes_",
    "cross_entropy_backward",
    "layer_norm",
    "own",
    "rms_norm",
    "rotary_",
    "softmax_stats",
    "swiglu",
    "using",
    "young_rates",
    "young_table",
]
