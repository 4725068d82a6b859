"""Run folders, written and read. In reading order:

- ``run_folder``: lock, recipe, manifest; ``metrics_file``: the records of a run
- ``progress``: what the terminal shows of a run; ``trackers``: copies of its figures to W&B, MLflow, ...
- ``run_list``: runs read back; ``compare``: several of them; ``overfit``: the verdict over one
- ``figure_format``: figures as text for people
"""
