"""Mistral (Jiang et al., arXiv 2310.06825): LLaMA with a window on attention."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.mistral.huggingface import HUGGINGFACE

MISTRAL = Family(name="mistral", architecture=ARCHITECTURES["mistral"], huggingface=HUGGINGFACE)
