"""Rows to token ids and loss mask: ``chat`` (conversations, prompts, documents), ``templates`` (the chat template), ``spans``
(supervised characters to tokens), ``rankings`` (answers to one prompt), ``texts`` and ``labels`` (classification), ``tagging``,
``questions`` (windows over a context).
"""
