"""SmolLM3: LLaMA in which some layers have no positions (NoPE, arXiv 2305.19466)."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.smollm3.huggingface import HUGGINGFACE

SMOLLM3 = Family(name="smollm3", architecture=ARCHITECTURES["smollm3"], huggingface=HUGGINGFACE)
