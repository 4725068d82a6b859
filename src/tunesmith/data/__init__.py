"""From files to batches.

In reading order: ``rows`` (row types), ``data_config`` (keys of the recipe), ``row_problems`` (errors of one
row), ``text_windows`` (text that rows share), ``read`` (files, Hub, built-in sets), ``formats`` (columns to
rows), ``encode`` (rows to tokens and loss mask), ``store`` (examples on disk), ``batch`` (examples to
tensors), ``check`` (lint, duplicates, contamination, preview)."""
