"""Metrics, predictions and answers of saved models: ``open_model``, ``evaluate_model``, ``predict``, ``answer_prompts``."""
