"""Training: from a recipe to a run.

In reading order: ``run``, ``setup`` (with ``adapter_choice``, ``meta_model``, ``device_map``), ``loop`` (with
``metric_sums``), ``session``, ``update`` (with ``master_weights``, ``optimizers``, ``precision``,
``update_ratio``, ``deepspeed_zero``), ``evaluation``, ``forward_batches``, ``reference``,
``frozen_body_cache``, ``fast_path`` and ``parity_check``, ``rehearsal`` (with ``memory_budget``,
``forecast``, ``time_plan``), ``run_state`` and ``checkpoint``, ``outcome``, ``plain_copy``, ``samples``,
``callbacks``, ``reproduce``, ``train_config``;
for several processes ``distributed``, ``launch`` and ``process_watch``; about this computer ``machine``.
"""
