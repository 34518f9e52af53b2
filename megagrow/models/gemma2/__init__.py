"""Gemma 2 (arXiv 2408.00118): norms around sub-layers, capped scores, windows."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.gemma2.huggingface import HUGGINGFACE

GEMMA2 = Family(name="gemma2", architecture=ARCHITECTURES["gemma2"], huggingface=HUGGINGFACE)
