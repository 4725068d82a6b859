"""Files with one fault each.

``BROKEN``: (name, bytes, rows, problems as (row, part of the field, part of the text)).

``rows`` counts good and bad rows.
"""

from __future__ import annotations

import json


def lines(*rows):
    return "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


GOOD = {"instruction": "Say hi", "output": "Hi!"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def chat(*turns, **more):
    return {"messages": list(turns), **more}


USER = {"role": "user", "content": "Hi"}
HEAD = b"instruction,output\nSay hi,Hi!\n"

BROKEN = [
    ("no-output.jsonl", lines(GOOD, {"instruction": "x"}), 2, [(2, "output", "column")]),
    ("no-instruction.jsonl", lines(GOOD, {"output": "x"}), 2, [(2, "instruction", "column")]),
    ("empty-output.jsonl", lines(GOOD, {"instruction": "x", "output": ""}), 2, [(2, "output", "empty")]),
    ("blank-output.jsonl", lines(GOOD, {"instruction": "x", "output": " \n"}), 2, [(2, "output", "only spaces")]),
    ("null-output.jsonl", lines(GOOD, {"instruction": "x", "output": None}), 2, [(2, "output", "null")]),
    ("number-output.jsonl", lines(GOOD, {"instruction": "x", "output": 42}), 2, [(2, "output", "a number 42")]),
    ("list-output.jsonl", lines(GOOD, {"instruction": "x", "output": ["a"]}), 2, [(2, "output", "a list")]),
    ("object-output.jsonl", lines(GOOD, {"instruction": "x", "output": {"a": 1}}), 2, [(2, "output", "an object")]),
    ("nan-output.jsonl", lines(GOOD, '{"instruction": "x", "output": NaN}\n'), 2, [(2, "output", "nan")]),
    ("list-input.jsonl", lines(GOOD, {**GOOD, "input": ["a"]}), 2, [(2, "input", "a list")]),
    ("nul.jsonl", lines(GOOD, {"instruction": "x", "output": "a\0b"}), 2, [(2, "output", "NUL")]),
    ("half-emoji.jsonl", lines(GOOD, '{"instruction": "x", "output": "\\ud83d"}\n'), 2, [(2, "output", "surrogate")]),
    ("latin1.jsonl", lines(GOOD) + '{"instruction": "café", "output": "x"}\n'.encode("latin-1"), 2, [(2, "instruction", "0xe9")]),
    ("broken-line.jsonl", lines(GOOD, '{"instruction": "x", \n', GOOD), 3, [(2, "line", "line 2, column")]),
    ("first-line.jsonl", lines('{"instruction"\n', GOOD), 2, [(1, "line", "line 1, column")]),
    ("not-an-object.jsonl", lines(GOOD, "[1, 2]\n", GOOD), 3, [(2, "row", "a list")]),
    ("only-a-string.jsonl", lines(GOOD, '"hello"\n'), 2, [(2, "row", "'hello'")]),
    ("two-on-a-line.jsonl", lines(GOOD, '{"instruction": "x", "output": "y"} {}\n'), 2, [(2, "line", "Extra data")]),
    ("deep.jsonl", lines(GOOD, "[" * 100_000 + "\n"), 2, [(2, "line", "")]),
    ("digits.jsonl", lines(GOOD, '{"instruction": ' + "9" * 5000 + "}\n"), 2, [(2, "line", "digits")]),
    ("broken.json", b'[{"instruction": "x", "output": "y"},\n {"instruction": "x" "output": "y"}]', 2, [(2, "json", "line 2, column")]),
    ("cut-short.json", b'[{"instruction": "x", "output": "y"}, {"instruction": "x', 2, [(2, "json", "line 1")]),
    ("never-closed.json", b'[{"instruction": "x", "output": "y"}', 2, [(2, "json", "end of the file")]),
    ("comma-at-end.json", b'[{"instruction": "x", "output": "y"},\n]', 2, [(2, "json", "line 2")]),
    ("more-after.json", b'[{"instruction": "x", "output": "y"}]\n{}', 2, [(2, "json", "more text")]),
    ("mixed-keys.json", lines(GOOD, {"question": "x", "answer": "y"}, GOOD), 3, [(2, "instruction", "question, answer")]),
    ("string-row.json", b'[{"instruction": "x", "output": "y"}, "text"]', 2, [(2, "row", "'text'")]),
    ("too-many.csv", HEAD + b"a,b,c\n", 2, [(2, "columns", "3")]),
    ("too-few.csv", HEAD + b"a\n", 2, [(2, "columns", "1")]),
    ("open-quote.csv", HEAD + b'a,"b\nc,d\n', 2, [(2, "line", "never closed")]),
    ("bad-quote.csv", HEAD + b'a,"b"c\nd,e\n', 3, [(2, "line", "")]),
    ("empty-cell.csv", HEAD + b"a,\n", 2, [(2, "output", "empty")]),
    ("cp949.csv", HEAD + "질문,답변\n".encode("cp949"), 2, [(2, "instruction", "byte 0x")]),
    ("nul.csv", HEAD + b"a\0,b\n", 2, [(2, "instruction", "NUL")]),
    ("bad-role.jsonl", lines(CHAT, chat(USER, {"role": "asistant", "content": "x"})), 2, [(2, "messages[1].role", "'asistant'")]),
    ("no-answer.jsonl", lines(CHAT, chat(USER)), 2, [(2, "messages", "only user")]),
    ("no-content.jsonl", lines(CHAT, chat(USER, {"role": "assistant"})), 2, [(2, "messages[1].content", "no such field")]),
    ("no-turns.jsonl", lines(CHAT, chat()), 2, [(2, "messages", "an empty list")]),
    ("text-turn.jsonl", lines(CHAT, chat(USER, "hello")), 2, [(2, "messages[1]", "'hello'")]),
    ("image.jsonl", lines(CHAT, chat({"role": "user", "content": [{"type": "image"}]}, USER)), 2, [(2, "messages[0].content[0]", "image")]),
    (
        "bad-call.jsonl",
        lines(CHAT, chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]})),
        2,
        [(2, "messages[1].tool_calls[0].arguments", "'{'")],
    ),
    ("bad-tools.jsonl", lines(CHAT, {**CHAT, "tools": "[{"}), 2, [(2, "tools", "'[{'")]),
    ("sharegpt.json", lines({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]}, {"conversations": 3}), 2,
     [(1, "conversations[1].value", "empty"), (2, "conversations", "a number 3")]),
    ("nul.txt", b"one\ntwo\0\nthree\n", 3, [(2, "text", "NUL")]),
    ("utf16.txt", "hello\n".encode("utf-16"), 1, [(1, "file", "UTF-16")]),
]  # fmt: skip
