"""Faster layers with the same results: ``attention`` and ``segments`` (packed rows),
``bidirectional_attention`` (encoders), ``varlen`` (GPU), ``fused_layers``, ``fused_encoder``,
``fused_bottleneck``, ``rotary``, ``linear_products`` (LoRA as one function), ``kernels`` (C),
``torch_compile``, ``self_check`` and ``autograd_context``.
"""
