"""Sources of rows: ``source`` (one source of a recipe, opened), ``row_files`` (a reader for each file
type), ``text_file`` (UTF-8, gzip), ``csv_table``, ``json_rows``, ``conll``, ``class_folder`` (a folder for each
class), ``hub_set`` (data sets of the Hub), ``builtin`` (rows made from Python's library), ``layout_advice``
(files whose layout does not match their type).
"""
