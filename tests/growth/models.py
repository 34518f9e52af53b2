"""The small models for all tests of the laws: all families, tied and untied, grouped queries.

Registered families are included automatically, from the package and from outside.
"""

from tests.models import toy_family
from tests.toys import FAMILIES, toy_model, toy_models

toy_family.register()

MODELS = (
    dict(toy_models())
    | {
        f"{family}-grouped": toy_model(
            family=family, heads=12, kv_heads=2, head_dim=2, tie_embeddings=False
        )
        for family in FAMILIES
    }
    | {
        "toy-tied": toy_model(family="toy"),
        "toy-untied": toy_model(family="toy", tie_embeddings=False),
    }
)
