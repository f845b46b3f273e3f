"""Loggers: where the metrics of a run go. `logger.py` has the protocol and the table."""
