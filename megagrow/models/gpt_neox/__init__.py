"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): parallel blocks, partial rotary."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.gpt_neox.huggingface import HUGGINGFACE

GPT_NEOX = Family(name="gpt_neox", architecture=ARCHITECTURES["gpt_neox"], huggingface=HUGGINGFACE)
