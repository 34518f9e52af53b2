"""megagrow: staged pretraining in which a language model grows while it trains."""

__version__ = "0.1.0"
