"""Documentation and the topic of the module that it comes from."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.make.library import Module, first_paragraph
from tunesmith.data.make.maker import Candidate, Maker

SHORTEST, LONGEST = 25, 400
"""Characters of a text."""

TOPICS = {
    "networking": "socket ssl socketserver selectors http urllib ftplib imaplib poplib smtplib smtpd nntplib telnetlib xmlrpc "
    "ipaddress asyncore asynchat wsgiref cgi cgitb nturl2path",
    "mail": "email mailbox mailcap",
    "text": "string textwrap re sre_compile sre_parse difflib stringprep shlex locale gettext html reprlib pprint codecs",
    "data formats": "json csv xml plistlib configparser tomllib base64 binascii quopri uu netrc struct pickle pickletools xdrlib",
    "numbers": "decimal fractions statistics random numbers",
    "files": "os pathlib shutil glob fnmatch tempfile filecmp fileinput stat posixpath ntpath genericpath zipfile tarfile gzip "
    "bz2 lzma linecache zipapp",
    "concurrency": "asyncio threading multiprocessing concurrent queue sched subprocess contextvars",
    "data types": "collections datetime calendar heapq bisect enum dataclasses types weakref copy graphlib zoneinfo uuid array",
    "code analysis": "ast dis inspect tokenize token symtable importlib pkgutil modulefinder runpy code codeop py_compile "
    "compileall pyclbr opcode keyword zipimport",
    "testing and debugging": "unittest doctest pdb bdb cProfile profile pstats timeit trace traceback tracemalloc warnings "
    "logging",
    "user interface": "tkinter turtle curses cmd getpass argparse optparse getopt rlcompleter",
}
"""Topic: the modules and packages of the standard library that are about it. Modules that are about several are in none."""

KOREAN = {
    "networking": "네트워크",
    "mail": "메일",
    "text": "텍스트",
    "data formats": "데이터 형식",
    "numbers": "숫자",
    "files": "파일",
    "concurrency": "동시성",
    "data types": "자료형",
    "code analysis": "코드 분석",
    "testing and debugging": "테스트와 디버깅",
    "user interface": "사용자 인터페이스",
}

TOPIC_OF = {module: topic for topic, modules in TOPICS.items() for module in modules.split()}


def topic(module: str) -> str | None:
    """The topic of a module: that of its package. None: the table does not have it."""
    return TOPIC_OF.get(module.partition(".")[0])


def _candidates(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    label = topic(module.name) or ""
    shown = KOREAN[label] if lang == "ko" else label
    for item in module.definitions:
        text = first_paragraph(item.doc) if item.doc else ""
        if SHORTEST <= len(text) <= LONGEST:
            yield shown, {"text": text, "label": shown}


MAKER = Maker(
    _candidates,
    about={
        "en": "Real: the text is the first paragraph of a docstring. The label is looked up: the topic of the text's module in a "
        "fixed table.",
        "ko": "Real: the text is the first paragraph of a docstring, in English. The label, in Korean, is looked up: the topic "
        "of the text's module in a fixed table.",
    },
    identity=("text",),
    labels=lambda row: [row["label"]],
    stratum=topic,
)
