"""Figures of predictions against what is true: classes, entities, answers, and pictures of them. Pure functions."""
