"""Pages for people, made of the files of a run folder or of plain records. Nothing here imports torch.

In reading order:

- ``run_page``: ``report.html`` and ``loss.png`` of a run folder; its data section is ``data_section``
- ``task_page``: ``report.html`` of an evaluation: figures, charts, the worst mistakes
- ``curves``: curves over the steps of a run, as a ``Plot`` with the figures under the pointer
- ``charts``: every chart that is a file or an image, as a matplotlib figure; ``fonts`` fits names of classes
  into it
- ``pages``: the Jinja2 environment, the filters of the templates, how a page is saved
- ``templates/``: ``base.html`` and ``style.css`` (every page), ``macros.html`` (tiles, tables, plots, answers
  ...), and one template for each page
"""
