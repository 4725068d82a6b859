"""Adapters on a network: ``adapter_types`` (what follows from an adapter's type), ``adapter_set`` (saved
adapters, several on one base), ``bottleneck_tuner``, ``virtual_tokens`` and ``virtual_token_layout``,
``lora_init`` and ``lora_factors``, ``restored_names``, ``ia3_layers``, ``linear_layers``.
"""
