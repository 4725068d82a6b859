"""Generation: ``decode`` (prompts to answers, sampling, streaming), ``kv_cache`` (a cache of fixed size)."""
