"""megagrow: staged pretraining in which a language model grows while it trains.

`docs/python-api.md` describes the public functions. They are imported from `megagrow.api` on first
use, so `import megagrow` imports nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megagrow.api import (
        convert_checkpoint,
        generate_text,
        grow_checkpoint,
        load_config,
        open_checkpoint,
        prepare_dataset,
        train_model,
    )

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "convert_checkpoint",
    "generate_text",
    "grow_checkpoint",
    "load_config",
    "open_checkpoint",
    "prepare_dataset",
    "train_model",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("megagrow.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
