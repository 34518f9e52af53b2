"""Qwen2 and Qwen2.5 (arXiv 2407.10671): LLaMA with biases of queries, keys and values."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.qwen2.huggingface import HUGGINGFACE

QWEN2 = Family(name="qwen2", architecture=ARCHITECTURES["qwen2"], huggingface=HUGGINGFACE)
