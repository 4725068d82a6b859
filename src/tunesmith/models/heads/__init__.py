"""From hidden states to losses: ``head_types`` (which head a class has, and its layers), ``lm_head`` (the
language-model loss at supervised positions), ``log_probs``, ``value_head``, ``task_heads`` (score, token,
span), ``noise`` (dropout and NEFTune by row).
"""
