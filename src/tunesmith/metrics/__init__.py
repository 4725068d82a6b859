"""Metrics of predictions against gold: classes, entities, answers, token means. Pure functions."""
