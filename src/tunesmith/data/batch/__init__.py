"""Examples to tensors: ``pack`` (packed or padded rows), ``shared_prompts`` (answers to one prompt), ``preference_batch``
(which answers are compared).
"""
