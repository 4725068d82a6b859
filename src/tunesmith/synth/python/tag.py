"""Tokens of sentences and lines of code, with BIO tags for the code names in them (from the syntax tree)."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping

from tunesmith.data.read import library
from tunesmith.data.read.library import Definition, Function, Module, dotted_name, exceptions
from tunesmith.synth.python.wording import Candidate, number, table

Entity = tuple[int, int, str]
"""(start, end, kind): the characters [start, end) of a text name something of this kind."""

KINDS = {
    "EXCEPTION": "예외",
    "MODULE": "모듈",
    "CLASS": "클래스",
    "NUMBER": "숫자",
    "FUNCTION": "함수",
    "PARAM": "매개변수",
}
"""Kind -> its Korean name. The rarer ones first: the rarest entity of a row is its group."""

SENTENCES = table("""
    ko: {MODULE} 모듈의 {FUNCTION} 함수는 {PARAM} 매개변수를 받습니다.
    ko: {FUNCTION} 함수를 쓰려면 먼저 {MODULE} 모듈을 가져와야 합니다.
    ko: {FUNCTION} 함수를 호출할 때 {REQUIRED} 인자를 빠뜨리면 안 됩니다.
    ko: {FUNCTION} 함수의 {NUMERIC} 매개변수에는 기본값 {NUMBER} 대신 다른 값을 줄 수 있습니다.
    ko: {NUMERIC} 인자를 생략하면 {FUNCTION} 함수는 {NUMBER} 값을 기본으로 사용합니다.
    ko: {FUNCTION} 함수는 상황에 따라 {EXCEPTION} 예외를 일으킬 수 있습니다.
    ko: {FUNCTION} 함수에서 {PARAM} 매개변수 다음에는 {NEXT} 매개변수가 옵니다.
    ko: {MODULE} 모듈의 문서에서 {FUNCTION} 함수의 설명을 찾을 수 있습니다.
    ko: {CLASS} 클래스의 {METHOD} 메서드는 {PARAM} 매개변수를 받습니다.
    ko: {CLASS} 객체를 만든 다음 {METHOD} 메서드를 호출하세요.
    ko: {MODULE} 모듈에는 {CLASS} 클래스가 있고, 그 안에 {METHOD} 메서드가 있습니다.
    ko: {CLASS} 클래스의 {METHOD} 메서드를 호출할 때는 {REQUIRED} 인자가 꼭 필요합니다.
    ko: {METHOD} 메서드의 {NUMERIC} 매개변수에는 기본값 {NUMBER} 대신 다른 값을 줄 수 있습니다.
    ko: {METHOD} 메서드에서 {PARAM} 매개변수 다음에는 {NEXT} 매개변수가 옵니다.
    ko: {EXCEPTION} 예외를 처리하려면 {METHOD} 메서드 호출을 try 문으로 감싸세요.
    ko: {MODULE} 모듈을 가져오면 {CLASS} 객체를 만들 수 있습니다.
    ko: {MODULE} 모듈에는 {CLASS} 클래스가 정의되어 있습니다.
    ko: {FAULT} 예외는 {MODULE} 모듈에 정의되어 있습니다.
    ko: {MODULE} 모듈을 쓸 때는 {FAULT} 예외에 대비하세요.
""")["ko"]
"""A Korean noun or a space follows every name, so that no particle depends on how the name is read aloud."""

QUOTES = "`'\"*"
SLOTS = {"METHOD": "FUNCTION", "FAULT": "EXCEPTION", "REQUIRED": "PARAM", "NEXT": "PARAM", "NUMERIC": "PARAM"}

PROSE = re.compile(r"[A-Z`'\"*][^|#@]*[.!?]")
TOKEN = re.compile(r"\d+\.\d+|\w+|[^\w\s]")
PRODUCTS = ("Tk", "Tix")
"""Classes with the name of the product that they belong to."""

NUMBER = r"(?<![\w.\-/:])(?:0x[0-9a-fA-F]+|\d+(?:\.\d+)?)(?![\w\-/:]|\.\d)"
WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|" + NUMBER)
KIND_BEHIND = re.compile(r"[`'\"*]* (class|object|instance|exception|function|method|argument|parameter)s?\b")
NO_CODE_BEHIND = re.compile(r"[`'\"*]* (attribute|codec|scheme|mode|option|key)s?\b")
NUMBER_IN_NAME = re.compile(
    r"\b(RFC|ISO|IEEE|PEP|Python|Tk|Tcl|HTTP|TLS|SSL|version|section|chapter|step|figure|table)[ /]$", re.I
)


class UnsureError(Exception):
    """A word of a sentence may be a name or an ordinary word, so that its tag would be a guess."""


def tag(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: sentences of docstrings and lines of code; the tags come from the syntax tree of their module.
    Sentences with a word that may be a name or an ordinary word are left out. Korean sentences are made up
    around real facts."""
    for text, entities in _korean(module, seed) if lang == "ko" else _english(module):
        named = [(start, end, KINDS[kind] if lang == "ko" else kind) for start, end, kind in entities]
        tokens, tags = bio(text, named)
        present = {kind for *_, kind in entities}
        if 3 <= len(tokens) <= 45:
            is_code = lang == "en" and text[0].islower()  # sentences begin with a capital letter
            rarest = next((kind for kind in KINDS if kind in present), "nothing named")
            group = "line of code" if is_code else rarest
            yield Candidate(group, text, {"tokens": tokens, "ner_tags": tags})


def bio(text: str, entities: list[Entity]) -> tuple[list[str], list[str]]:
    """Return the tokens of a text and their tags: B- where an entity begins, I- inside it, O elsewhere."""
    tokens, tags = [], []
    for match in TOKEN.finditer(text):
        inside = next(((start, kind) for start, end, kind in entities if start <= match.start() < end), None)
        tokens.append(match.group())
        tags.append(f"{'B' if match.start() == inside[0] else 'I'}-{inside[1]}" if inside else "O")
    return tokens, tags


def _english(module: Module) -> Iterator[tuple[str, list[Entity]]]:
    shared = names(module)
    yield from _sentences(module, shared)
    nodes: list[ast.AST] = [
        node for node in ast.walk(module.tree) if isinstance(node, ast.Import | ast.Raise)
    ]
    nodes += [item.node for item in module.definitions if item.kind in ("class", "function", "method")]
    for node in (node for node in nodes if isinstance(node, ast.stmt)):  # definitions in C have no statement
        line = module.lines[node.lineno - 1].strip()
        if number(line) % 3 == 0 and (entities := _code_entities(node, line, shared)):
            yield line, entities


def _sentences(module: Module, shared: Mapping[str, str]) -> Iterator[tuple[str, list[Entity]]]:
    """Yield the sentences of docstrings in which every word surely is or is not a name."""
    for item in module.definitions if module.text else ():  # modules in C have no known parameters
        taken = {one.name for one in library.parameters(item)}
        known = {**shared, **{name: "?" if name in shared else "PARAM" for name in taken}}
        for sentence in (text for part in library.paragraphs(item.doc) for text in library.sentences(part)):
            if PROSE.fullmatch(sentence) and not re.search(r">>>|\s[-*:+]\s", sentence):
                try:
                    entities = mentions(sentence, known)
                except UnsureError:
                    continue
                if entities or number(sentence) % 3 == 0:  # most sentences name nothing
                    yield sentence, entities


def names(module: Module) -> dict[str, str]:
    """Return what each name means in the documentation of a module; "?" where it has two meanings."""
    known = dict.fromkeys([*library.modules(), *sys.stdlib_module_names], "MODULE")
    errors = exceptions(module)
    found = [(name, "EXCEPTION") for name in errors]
    for item in module.definitions[1:]:
        found.append((item.short, "EXCEPTION" if item.short in errors else item.kind.upper()))
        if item.kind == "method":
            owned = item.name.removeprefix(f"{module.name}.")
            found += [(owned, "FUNCTION"), (f"self.{item.short}", "FUNCTION")]
    for name, kind in found:
        both = {known.get(name, kind), kind}
        known[name] = kind if len(both) == 1 else "FUNCTION" if both == {"FUNCTION", "METHOD"} else "?"
    return known


def mentions(sentence: str, known: Mapping[str, str]) -> list[Entity]:
    """Return the entities of a sentence. Raises UnsureError when a word may or may not be a name."""
    entities: list[Entity] = []
    for match in WORD.finditer(sentence):
        word, before, after = match.group(), sentence[: match.start()], sentence[match.end() :]
        kind = "NUMBER" if word[0].isdigit() else known.get(word, "")
        if _is_name(word, kind, before, after):
            entities.append((*match.span(), "FUNCTION" if kind == "METHOD" else kind))
    return entities


def _is_name(word: str, kind: str, before: str, after: str) -> bool:
    """Return whether a word between two texts is a name. Raises UnsureError when that is unclear.

    A word is a name when it is written as one, or next to its kind (``the socket module``). Methods are often
    named by verbs, which stay ordinary words.
    """
    written = _is_written_as_name(word, before, after)
    if kind == "NUMBER":
        sure, doubtful = True, bool(NUMBER_IN_NAME.search(before))
    elif kind in ("", "PROPERTY"):
        sure, doubtful = False, written
    else:
        capital = kind in ("CLASS", "EXCEPTION") and word[0].isupper() and before and word not in PRODUCTS
        may_follow = kind == "PARAM" or (kind != "MODULE" and not word.islower())
        next_to_kind = may_follow and KIND_BEHIND.match(after)
        of_module = kind == "MODULE" and before.lower().endswith("the ") and after.startswith(" module")
        sure = bool(written or capital or next_to_kind or of_module)
        hyphenated = not written and "-" in (before[-1:], after[:1])
        no_code = NO_CODE_BEHIND.match(after) is not None
        doubtful = kind == "?" or hyphenated or no_code or (not sure and kind != "METHOD")
    if doubtful:
        raise UnsureError
    return sure


def _is_written_as_name(word: str, before: str, after: str) -> bool:
    """Return whether a word is in quotes, before parentheses, or has a dot, underscore or capital inside."""
    if before and after and before[-1] in QUOTES and after[0] in QUOTES:
        return True
    return bool(re.search(r"_|\.|[a-z][A-Z]|[A-Z]{2}[a-z]", word) or re.match(r"\((?!e?s\))", after))


def _code_entities(node: ast.stmt, line: str, known: Mapping[str, str]) -> list[Entity]:
    """Return the entities in a statement's first line; [] unless the tree tells the kind of every name."""
    if not line.isascii() or "#" in line:
        return []
    defines = isinstance(node, ast.ClassDef | Function)
    if not (line.endswith(":") if defines else node.lineno == node.end_lineno):
        return []  # the statement continues on another line
    entities: list[Entity] = []
    marks: list[ast.expr] = []
    if isinstance(node, ast.ClassDef | Function):
        marks, start = node.decorator_list, line.index(f" {node.name}") + 1
        kind = "FUNCTION" if isinstance(node, Function) else known[node.name]
        entities.append((start, start + len(node.name), kind))
    parts = (part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.stmt))
    for one in (inner for part in parts if part not in marks for inner in ast.walk(part)):
        named = _name_and_kind(one, known)
        if named is None:
            continue
        name, kind = named
        if not kind or not isinstance(one, ast.expr | ast.arg | ast.alias):
            return []
        start = one.col_offset - node.col_offset
        if one.lineno != node.lineno or line[start : start + len(name)] != name:
            return []
        entities.append((start, start + len(name), kind))
    return sorted(entities) if all(kind in KINDS for *_, kind in entities) else []


def _name_and_kind(node: ast.AST, known: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the name in a node and its kind ("" = the tree does not tell); None where there is no name."""
    match node:
        case ast.arg(arg=name):
            return name, "PARAM"
        case ast.alias(name=name, asname=None):
            return name, "MODULE"
        case ast.Name(id=name) if known.get(name) in ("CLASS", "EXCEPTION"):
            return name, known[name]
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return repr(value), "NUMBER"
    nameless = isinstance(node, ast.Constant | ast.Call | ast.arguments | ast.expr_context)
    return None if nameless else ("", "")


def _korean(module: Module, seed: int) -> Iterator[tuple[str, list[Entity]]]:
    """Yield two sentences for each public name of a module that is not a property."""
    needed = {text: set(re.findall(r"{(\w+)}", text)) for text in SENTENCES}
    for item in module.definitions[1:]:
        own, slots = _slots(item)
        fitting = [text for text, names in needed.items() if own in names and names <= slots.keys()]
        for text in sorted(fitting, key=lambda text: number(seed, item.name, text))[:2]:
            quoted = number(seed, text, item.name) % 2
            sentence, entities = "", []
            for piece in re.split(r"({\w+})", text):
                if not piece.startswith("{"):
                    sentence += piece
                    continue
                slot, quote = piece[1:-1], "`" if quoted and piece != "{NUMBER}" else ""
                start = len(sentence) + len(quote)
                entities.append((start, start + len(slots[slot]), SLOTS.get(slot, slot)))
                sentence += f"{quote}{slots[slot]}{quote}"
            yield sentence, entities


def _slots(item: Definition) -> tuple[str, dict[str, str]]:
    """Return the slot of a definition itself, and the names that fill each slot."""
    errors = exceptions(item.module)
    own = "FAULT" if item.kind == "class" and item.short in errors else item.kind.upper()
    owner = item.name.split(".")[-2:-1] if item.kind == "method" else []
    names = {
        "CLASS": [name for name in owner if name not in errors],
        **_parameter_names(item),
        "EXCEPTION": [*map(dotted_name, library.raised_exceptions(item) or ())],
    }
    first = {slot: some[0] for slot, some in names.items() if some}
    return own, {own: item.short, "MODULE": item.module.name, **first}


def _parameter_names(item: Definition) -> dict[str, list[str]]:
    taken = library.parameters(item)
    plain = [one for one in taken if one.shown == one.name]
    constant = [(one.name, one.default.value) for one in plain if isinstance(one.default, ast.Constant)]
    numeric = [(name, repr(value)) for name, value in constant if type(value) in (int, float)]
    return {
        "PARAM": [one.name for one in taken[:1] if one in plain],
        "NEXT": [one.name for one in taken[1:2] if one in plain],
        "REQUIRED": [one.name for one in plain if one.default is None],
        "NUMERIC": [name for name, _ in numeric],
        "NUMBER": [value for _, value in numeric],
    }
