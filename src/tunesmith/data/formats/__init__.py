"""Columns to typed rows: ``columns`` (which format a file has), ``fields`` (checks of one value), ``turns`` (conversations),
``preference_fields`` and ``grades`` (rankings), ``label_fields``, ``word_fields`` (tags), ``squad_file`` (questions).
"""
