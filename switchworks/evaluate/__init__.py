"""Measuring a trained model."""

from switchworks.evaluate.perplexity import mean_nats

__all__ = ["mean_nats"]
