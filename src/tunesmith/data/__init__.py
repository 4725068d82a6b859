"""From files to batches.

In reading order: ``rows`` (what a row can be), ``config`` (keys of the recipe), ``problems`` (what is wrong with one row),
``read`` (files, Hub, built-in), ``formats`` (columns to rows), ``encode`` (rows to tokens and loss mask), ``store`` (examples on
disk), ``batch`` (examples to tensors), ``check`` (lint, duplicates, contamination, preview).
"""
