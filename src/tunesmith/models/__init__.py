"""Networks: found, loaded, adapted, made fast.

In reading order: ``network`` (facts about a network or its config), ``find`` (names to folders),
``load`` (folders to networks), ``heads`` (logits and log-probabilities),
``adapters`` (what is added to a network), ``fast`` (attention and fused layers), ``generate`` (answers).
"""
