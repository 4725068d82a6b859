"""What is added to a network: ``kinds`` (what follows from an adapter's type), ``adapters`` (saved ones,
several at once), ``bottleneck``, ``virtual_tokens`` and ``layout``,
``lora_init`` and ``factors``, ``scaled`` (IA3), ``linear``.
"""
