"""Sources of rows: ``source`` (one source of a recipe, opened), ``row_files`` (csv, txt, parquet ...),
``json_rows``, ``conll``, ``class_folder`` (a folder for each class), ``hub_set`` (data sets of the Hub),
``builtin`` (rows made from Python's library).
"""
