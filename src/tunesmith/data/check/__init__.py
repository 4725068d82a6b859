"""What is wrong with data before it is trained on: ``lint`` and ``lint_pairs``, ``near_duplicates`` and ``minhash``,
``contamination`` (training rows among evaluation rows), ``preview`` (the loss mask, shown).
"""
