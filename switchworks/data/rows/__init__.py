"""Tokens to rows to batches."""
