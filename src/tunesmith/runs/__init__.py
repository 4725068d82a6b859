"""Run folders, as they are written and read: ``run_folder``, ``metrics_file`` (records), ``progress`` (what the screen shows),
``trackers`` (wandb ...), ``kept_runs`` (all runs of a folder), ``compare``, ``overfit``, ``figures`` (numbers for people).
"""
