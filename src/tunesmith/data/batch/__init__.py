"""Examples to tensors: ``pack`` (packed or padded rows), ``shared_prompts`` (responses to one prompt),
``preference_batch`` (which responses are compared), ``other_response`` (KTO's mismatched pairs), ``step``."""
