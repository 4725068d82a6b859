"""LLM as a judge, in reading order: ``judges`` (a language model, or a reward model), ``endpoint`` (a server), ``rubric`` (scores
from 1 to 5), ``verdicts`` (asks in both orders, keeps every verdict in a file), ``examination`` (is the judge to be believed?),
``judge_run`` (answers of systems -> win rates)."""
