"""Phi-3 (arXiv 2404.14219): LLaMA with fused projections, windows, partial rotary positions."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.phi3.huggingface import HUGGINGFACE

PHI3 = Family(name="phi3", architecture=ARCHITECTURES["phi3"], huggingface=HUGGINGFACE)
