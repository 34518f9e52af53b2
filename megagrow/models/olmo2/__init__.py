"""OLMo 2 (arXiv 2501.00656): norms after sub-layers, and of all queries and all keys."""

from megagrow.config.families import ARCHITECTURES
from megagrow.models.family import Family
from megagrow.models.olmo2.huggingface import HUGGINGFACE

OLMO2 = Family(name="olmo2", architecture=ARCHITECTURES["olmo2"], huggingface=HUGGINGFACE)
