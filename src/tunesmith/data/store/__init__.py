"""Examples on disk: ``prepare`` (a recipe's data, ready), ``build`` (one source encoded), ``cache`` (memory-mapped entries),
``encoded`` (examples as training sees them), ``mix`` (row order of an epoch), ``data_report`` (counts for people).
"""
