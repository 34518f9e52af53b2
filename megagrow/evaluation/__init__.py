"""Evaluate a trained model: perplexity, LAMBADA, and EleutherAI's harness."""
