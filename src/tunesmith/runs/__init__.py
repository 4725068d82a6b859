"""Run folders, as they are written and read: ``run_folder``, ``tracking`` (metrics and progress), ``trackers`` (wandb ...),
``kept_runs`` (all runs of a folder), ``compare``, ``overfit``, ``figures`` (numbers for people).
"""
