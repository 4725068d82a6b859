"""Columns to typed rows: ``columns`` (the table of formats), ``fields`` (checks of one value), ``turns``
(conversations), ``dialogues`` (conversations in one text), ``column_advice`` (what to type for other columns),
``preference_fields`` and ``ratings`` (rankings), ``judgement_fields`` (unpaired preference),
``label_fields``, ``word_fields`` (tags), ``squad_file`` (questions).
"""
