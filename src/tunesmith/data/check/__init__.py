"""What is wrong with data before it is trained on: ``lint``, ``lint_pairs``, ``lint_judgements`` and
``balance`` (unpaired preference), ``near_duplicates`` and ``minhash``, ``contamination`` (training rows among
evaluation rows), ``preview`` (the loss mask, shown).
"""
