"""Checks of data before training: ``lint`` with ``lint_pairs``, ``lint_judgements`` and ``balance`` (unpaired
preference), ``near_duplicates`` with ``minhash``, ``contamination`` (training rows among evaluation rows),
``preview`` (the loss mask).
"""
