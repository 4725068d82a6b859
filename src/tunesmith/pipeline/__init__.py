"""``tunesmith pipeline FILE``: training runs in order, each on the result of an earlier one.

In reading order: ``pipeline_file`` (YAML to stages with checked recipes), ``stage_checks`` (what can be known
before the first stage starts), ``stage_manifest`` (what a stage was made of, and what changed since),
``run_stages`` (plan, train, summarise), ``answer_comparison`` (the results' answers to the same prompts).
"""
