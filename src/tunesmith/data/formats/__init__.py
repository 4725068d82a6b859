"""Columns to typed rows: ``columns`` (which format a file has), ``fields`` (checks of one value), ``turns`` (conversations),
``preference_fields`` and ``grades`` (rankings), ``judged_fields`` (a response and its label), ``label_fields``,
``word_fields`` (tags), ``squad_file`` (questions).
"""
