"""Examples on disk: ``prepare`` (a recipe's data, ready), ``build`` (one source encoded), ``cache`` (memory-mapped entries),
``encoded`` (examples as training sees them), ``epochs`` and ``mix`` (steps, and the order of rows), ``row_writer`` (rows to a
file), ``data_report`` (counts for people).
"""
