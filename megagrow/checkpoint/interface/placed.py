"""Place a catalog's tensors in the layout that a conversion requests."""

from __future__ import annotations

from megagrow.checkpoint.interface.format import SinkRequest
from megagrow.checkpoint.interface.model_of import optimizer_of
from megagrow.errors import ConfigError
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.state.catalog import Catalog
from megagrow.state.placement import Placement, split_axis


def placed(catalog: Catalog, request: SinkRequest) -> Placement:
    """The placement in the requested layout, grouped as the run's optimizer groups parameters.

    Raises:
        ConfigError: the model cannot be split this way.
    """
    layout = request.meta.layout
    if layout.pipeline > 1 and layout.zero > 1:
        raise ConfigError(
            f"ZeRO {layout.zero} does not go with pipeline {layout.pipeline}",
            fix="give --zero 0 or --zero 1, or --pipeline 1",
        )
    for tensor in catalog:
        axis = split_axis(tensor)
        if axis is None or tensor.axes[axis] == "vocab":
            continue
        if tensor.shape[axis] % layout.tensor:
            raise ConfigError(
                f"{tensor.name} cannot be cut into {layout.tensor} equal parts",
                found=f"axis {tensor.axes[axis]} of length {tensor.shape[axis]}",
                fix=f"give --tensor a divisor of {tensor.shape[axis]}",
            )
    optimizer = optimizer_of(request.meta).kind
    placement = Placement(catalog, layout, group_keys(catalog, _rules(request), optimizer))
    try:
        placement.cuts  # noqa: B018
    except ValueError as error:
        raise ConfigError(
            f"the model's layers cannot be cut into {layout.pipeline} pipeline stages",
            found=error,
            fix="give a smaller --pipeline",
        ) from None
    return placement


def _rules(request: SinkRequest) -> OptimizerRules:
    try:
        return OptimizerRules.from_json(request.meta.run_state["rules"])
    except (KeyError, TypeError, ValueError):
        return OptimizerRules()
