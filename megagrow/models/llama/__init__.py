"""LLaMA (Touvron et al., arXiv 2302.13971), and its successors with plain rotary positions."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.llama.huggingface import HUGGINGFACE

LLAMA = Family(
    name="llama", architecture=ARCHITECTURES["llama"], huggingface=HUGGINGFACE, megatron=True
)
