"""What a run does with the documents of a sample (`data.documents`)."""

from __future__ import annotations

from megagrow.config import Config, ModelConfig
from megagrow.engine.precision import on_gpu
from megagrow.errors import ConfigError
from megagrow.models.common.documents import choose_way
from megagrow.models.registry import family_of
from megagrow.schedule.stages import stage_documents


def require_separation(config: Config, model: ModelConfig, index: int) -> None:
    """Require of a stage with `documents: mask` that the model's layers know documents.

    Raises:
        ConfigError: they are layers of a family's own that do not.
    """
    if stage_documents(config, index) == "mask" and not family_of(model).separates_documents:
        raise ConfigError(
            f"stages[{index}]: data.documents is mask, but layers of family {model.family} do not "
            "keep documents apart",
            fix="set data.documents=packed; or let the family's layers take `documents`, and say "
            "so in its Family(documents=True)",
        )


def documents_in_words(config: Config, model: ModelConfig, index: int) -> list[str]:
    """How a stage's documents attend, if those of a sample do not see each other; else nothing."""
    if stage_documents(config, index) == "packed":
        return []
    _, how = choose_way(model, gpu=on_gpu())
    return [f"do not see each other ({how}); budgets in FLOPs count whole samples"]
