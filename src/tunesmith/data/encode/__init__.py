"""Rows to token ids and loss mask: ``conversations`` (chats, prompts, documents), ``templates`` (chat
templates), ``template_limits`` (their size, time and memory), ``spans`` (supervised characters of a
rendering), ``turn_tokens`` (tokens of the template typed in a message), ``turn_findings`` (remarks about the
turns of a file), ``rankings`` (responses to one prompt), ``judgements`` (a response and its label), ``texts`` and
``labels`` (classification), ``tagging``, ``questions`` (windows over a context); ``token_text`` (tokens to text)."""
