"""Generation, in reading order: ``decode`` (prompts to texts), ``engine`` (the queue), ``running_rows`` (a request, its row,
its answer), ``sampling`` (the rule by which tokens are chosen), ``stop_tokens``, ``text_stream`` (tokens to text), ``slots``
(which tokens are where), ``forward_passes``, ``slot_cache``, ``prompt_layers``, ``decode_step`` and
``int8_weights`` (how the model runs),
``row_adapters`` (rows of several adapters), ``vllm_backend`` (vLLM in the engine's place)."""
