"""Examples to tensors: ``step`` (a step, its examples, where steps come from), ``pack`` (packed or padded rows),
``shared_prompts`` (answers to one prompt), ``preference_batch`` (which answers are compared), ``other_response`` (KTO's pairs).
"""
