"""The small models that all laws are tried on: both families, tied and untied, grouped queries."""

from toys import FAMILIES, toy_model, toy_models

MODELS = dict(toy_models()) | {
    f"{family}-grouped": toy_model(
        family=family, heads=12, kv_heads=2, head_dim=2, tie_embeddings=False
    )
    for family in FAMILIES
}
