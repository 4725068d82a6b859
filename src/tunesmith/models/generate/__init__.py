"""Answers: ``decode`` (sampling, streaming), ``kv_cache``."""
