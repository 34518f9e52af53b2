"""GPT-2 (Radford et al., 2019)."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.gpt2.huggingface import HUGGINGFACE

GPT2 = Family(
    name="gpt2", architecture=ARCHITECTURES["gpt2"], huggingface=HUGGINGFACE, megatron=True
)
