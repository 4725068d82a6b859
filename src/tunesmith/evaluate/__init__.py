"""Metrics and predictions of saved models: ``open_model``, ``evaluate_model``, ``predict``."""
