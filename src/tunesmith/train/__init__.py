"""Training: a recipe becomes a run.

In reading order: ``run``, ``setup`` (with ``adapter_choice``, ``outline``), ``loop`` (with ``metric_sums``), ``session``,
``update`` (with ``masters``, ``optim``, ``precision``, ``update_ratio``, ``zero``), ``evaluation``, ``fitting``, ``reference``,
``frozen_body_cache``, ``fast_path``, ``forecast``, ``state`` and ``checkpoint``, ``outcome``, ``plain_copy``, ``samples``,
``hooks``, ``reproduce``, ``config``; on several processes ``distributed``, ``launch``, ``watch``, ``placement``; on this
computer ``machine``.
"""
