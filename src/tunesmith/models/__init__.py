"""Networks: found, loaded, adapted, made fast.

In reading order: ``find`` (names to folders), ``load`` (folders to networks), ``heads`` (logits and log-probabilities),
``adapters`` (what is added to a network), ``fast`` (attention and fused layers), ``generate`` (answers).
"""
