"""Qwen3 (arXiv 2505.09388): LLaMA with norms of every query and key."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.qwen3.huggingface import HUGGINGFACE

QWEN3 = Family(name="qwen3", architecture=ARCHITECTURES["qwen3"], huggingface=HUGGINGFACE)
