"""Offline bulk text generation with early-exit language models."""

__version__ = "0.1.0"
