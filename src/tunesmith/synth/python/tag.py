"""Tokens of sentences and lines of code, and what each of them names (BIO), as the syntax tree says."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping

from tunesmith.data.read import library
from tunesmith.data.read.library import Definition, Function, Module, dotted_name, exceptions
from tunesmith.synth.python.wording import Candidate, number, table

Entity = tuple[int, int, str]
"""Characters [start, end) of a text, and what they name."""

KINDS = {
    "EXCEPTION": "예외",
    "MODULE": "모듈",
    "CLASS": "클래스",
    "NUMBER": "숫자",
    "FUNCTION": "함수",
    "PARAM": "매개변수",
}
"""With their Korean names. The rarer ones first: a row is drawn as one of its rarest entity."""

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
"""Every name stands before a Korean noun or a space, so that no particle depends on how it is read aloud."""

QUOTES = "`'\"*"
SLOTS = {"METHOD": "FUNCTION", "FAULT": "EXCEPTION", "REQUIRED": "PARAM", "NEXT": "PARAM", "NUMERIC": "PARAM"}

PROSE = re.compile(r"[A-Z`'\"*][^|#@]*[.!?]")
TOKEN = re.compile(r"\d+\.\d+|\w+|[^\w\s]")
PRODUCTS = ("Tk", "Tix")
"""Classes that share their name with what they belong to."""

NUMBER = r"(?<![\w.\-/:])(?:0x[0-9a-fA-F]+|\d+(?:\.\d+)?)(?![\w\-/:]|\.\d)"
WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|" + NUMBER)
KIND_BEHIND = re.compile(r"[`'\"*]* (class|object|instance|exception|function|method|argument|parameter)s?\b")
NO_CODE_BEHIND = re.compile(r"[`'\"*]* (attribute|codec|scheme|mode|option|key)s?\b")
NUMBER_IN_NAME = re.compile(
    r"\b(RFC|ISO|IEEE|PEP|Python|Tk|Tcl|HTTP|TLS|SSL|version|section|chapter|step|figure|table)[ /]$", re.I
)


class UnsureError(Exception):
    """A word of a sentence may be a name or a mere word, so that its tag would be a guess."""


def tag(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: sentences of docstrings and lines of code; the tags are read off the syntax tree of their module.
    Sentences in which a word may be a name or a mere word are left out. Korean ones are made up around real facts."""
    for text, entities in _korean(module, seed) if lang == "ko" else _english(module):
        shown = [(start, end, KINDS[kind] if lang == "ko" else kind) for start, end, kind in entities]
        tokens, tags = bio(text, shown)
        rarest = [kind for kind in KINDS if any(kind == one for *_, one in entities)]
        if 3 <= len(tokens) <= 45:
            of_code = lang == "en" and text[0].islower()  # sentences begin with a capital letter
            group = "line of code" if of_code else next(iter(rarest), "nothing named")
            yield Candidate(group, text, {"tokens": tokens, "ner_tags": tags})


def bio(text: str, entities: list[Entity]) -> tuple[list[str], list[str]]:
    """Tokens of a text and a tag for each: B- where an entity begins, I- within it, O elsewhere."""
    tokens, tags = [], []
    for match in TOKEN.finditer(text):
        inside = next(((start, kind) for start, end, kind in entities if start <= match.start() < end), None)
        tokens.append(match.group())
        tags.append(f"{'B' if match.start() == inside[0] else 'I'}-{inside[1]}" if inside else "O")
    return tokens, tags


def _english(module: Module) -> Iterator[tuple[str, list[Entity]]]:
    shared = names(module)
    for item in module.definitions if module.text else ():  # of what is written in C no parameter is known
        taken = {one.name for one in library.parameters(item)}
        known = {**shared, **{name: "?" if name in shared else "PARAM" for name in taken}}
        for sentence in (one for part in library.paragraphs(item.doc) for one in library.sentences(part)):
            if PROSE.fullmatch(sentence) and not re.search(r">>>|\s[-*:+]\s", sentence):
                try:
                    entities = mentions(sentence, known)
                except UnsureError:
                    continue
                if entities or number(sentence) % 3 == 0:  # most sentences name nothing
                    yield sentence, entities
    nodes: list[ast.AST] = [one for one in ast.walk(module.tree) if isinstance(one, ast.Import | ast.Raise)]
    nodes += [one.node for one in module.definitions if one.kind in ("class", "function", "method")]
    for node in nodes:
        line = module.lines[node.lineno - 1].strip() if isinstance(node, ast.stmt) else ""
        if number(line) % 3 == 0 and (entities := _in_code(node, line, shared)):
            yield line, entities


def names(module: Module) -> dict[str, str]:
    """What each name is in the documentation of a module; "?" where it is two things."""
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
    """The entities of a sentence. Raises UnsureError where the words do not say whether a name is meant.

    A word is a name when it is written as one: in quotes, before parentheses, with a dot, an underscore or a
    capital letter within it, or next to a word that says what it is (``the socket module``). Methods are called
    by verbs, which stay words.
    """
    found: list[Entity] = []
    for match in WORD.finditer(sentence):
        word, before, after = match.group(), sentence[: match.start()], sentence[match.end() :]
        kind = "NUMBER" if word[0].isdigit() else known.get(word, "")
        quoted = before[-1:] in QUOTES and after[:1] in QUOTES and before != "" and after != ""
        inner = re.search(r"_|\.|[a-z][A-Z]|[A-Z]{2}[a-z]", word)
        written = quoted or inner or re.match(r"\((?!e?s\))", after)
        if kind == "NUMBER":
            sure, doubtful = True, bool(NUMBER_IN_NAME.search(before))
        elif kind in ("", "PROPERTY"):
            sure, doubtful = False, bool(written)
        else:
            capital = kind in ("CLASS", "EXCEPTION") and word[0].isupper() and before and word not in PRODUCTS
            beside = KIND_BEHIND.match(after) and kind != "MODULE" and (kind == "PARAM" or not word.islower())
            of_module = kind == "MODULE" and before.lower().endswith("the ") and after.startswith(" module")
            sure = bool(written or capital or beside or of_module)
            part = not written and "-" in (before[-1:], after[:1])
            other = NO_CODE_BEHIND.match(after) is not None
            doubtful = kind == "?" or part or other or (not sure and kind != "METHOD")
        if doubtful:
            raise UnsureError
        if sure:
            found.append((*match.span(), "FUNCTION" if kind == "METHOD" else kind))
    return found


def _in_code(node: ast.AST, line: str, known: Mapping[str, str]) -> list[Entity]:
    """What the names in the first line of a statement are; [] where the tree does not say it of each."""
    named = isinstance(node, ast.ClassDef | Function)
    if not isinstance(node, ast.stmt) or not line.isascii() or "#" in line:
        return []
    if not (line.endswith(":") if named else node.lineno == node.end_lineno):
        return []  # goes on behind the line
    marks = node.decorator_list if isinstance(node, ast.ClassDef | Function) else []
    parts = [one for one in ast.iter_child_nodes(node) if not isinstance(one, ast.stmt) and one not in marks]
    found: list[Entity] = []
    if isinstance(node, ast.ClassDef | Function):
        start = line.index(f" {node.name}") + 1
        kind = "FUNCTION" if isinstance(node, Function) else known[node.name]
        found.append((start, start + len(node.name), kind))
    for one in (inner for part in parts for inner in ast.walk(part)):
        match one:
            case ast.arg(arg=name):
                kind = "PARAM"
            case ast.alias(name=name, asname=None):
                kind = "MODULE"
            case ast.Name(id=name):
                kind = known[name] if known.get(name) in ("CLASS", "EXCEPTION") else ""
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                name, kind = repr(value), "NUMBER"
            case ast.Constant() | ast.Call() | ast.arguments() | ast.expr_context():
                continue
            case _:
                return []
        start = one.col_offset - node.col_offset
        if one.lineno != node.lineno or line[start : start + len(name)] != name:
            return []
        found.append((start, start + len(name), kind))
    return sorted(found) if all(kind in KINDS for *_, kind in found) else []


def _korean(module: Module, seed: int) -> Iterator[tuple[str, list[Entity]]]:
    """Two sentences for each public name of a module that is no property."""
    for item in module.definitions[1:]:
        own, slots = _slots(item)
        places = [(text, set(re.findall(r"{(\w+)}", text))) for text in SENTENCES]
        fitting = [text for text, needed in places if own in needed and needed <= slots.keys()]
        for text in sorted(fitting, key=lambda text: number(seed, item.name, text))[:2]:
            quoted = number(seed, text, item.name) % 2
            out, entities = "", []
            for piece in re.split(r"({\w+})", text):
                shown = slots[piece[1:-1]] if piece.startswith("{") else piece
                quote = "`" if shown != piece and quoted and piece != "{NUMBER}" else ""
                out += quote
                if shown != piece:
                    entities.append((len(out), len(out) + len(shown), SLOTS.get(piece[1:-1], piece[1:-1])))
                out += shown + quote
            yield out, entities


def _slots(item: Definition) -> tuple[str, dict[str, str]]:
    """The place in a sentence for a definition itself, and what may be said of it by place."""
    errors = exceptions(item.module)
    own = "FAULT" if item.kind == "class" and item.short in errors else item.kind.upper()
    owner = item.name.split(".")[-2:-1] if item.kind == "method" else []
    taken = library.parameters(item)
    plain = [one for one in taken if one.shown == one.name]
    constant = [(one.name, one.default.value) for one in plain if isinstance(one.default, ast.Constant)]
    numeric = [(name, repr(value)) for name, value in constant if type(value) in (int, float)]
    found = {
        "CLASS": [name for name in owner if name not in errors],
        "PARAM": [one.name for one in taken[:1] if one in plain],
        "NEXT": [one.name for one in taken[1:2] if one in plain],
        "REQUIRED": [one.name for one in plain if one.default is None],
        "NUMERIC": [name for name, _ in numeric],
        "NUMBER": [value for _, value in numeric],
        "EXCEPTION": [*map(dotted_name, library.raised_exceptions(item) or ())],
    }
    slots = {place: some[0] for place, some in found.items() if some}
    return own, {own: item.short, "MODULE": item.module.name, **slots}
