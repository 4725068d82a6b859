"""Folders to networks: ``load``, ``head_loading`` (a task head on a body), ``probe`` (does it answer as it was saved?),
``vocabulary`` (new tokens), ``quantization`` and ``dequantized`` (4 and 8 bits), ``patterns`` (modules by name).
"""
