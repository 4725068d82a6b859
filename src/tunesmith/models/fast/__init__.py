"""Faster layers that compute the same: ``attention`` and ``pieces`` (packed rows), ``varlen`` (on a GPU), ``fused``,
``fused_encoder``, ``fused_bottleneck``, ``rotary``, ``products`` (LoRA in one function), ``kernels`` (C), ``compiled``,
``self_check``.
"""
