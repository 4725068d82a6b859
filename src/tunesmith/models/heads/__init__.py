"""What a loss asks of a network: ``head_types`` (which head a class has, and its layers), ``lm_head``
(supervised positions through the vocabulary projection), ``log_probs``,
``task_heads`` (score, token, span), ``bidirectional`` (encoders), ``noise`` (dropout by row).
"""
