"""Figures of predictions against what is true: classes, entities, answers. Pure functions."""
