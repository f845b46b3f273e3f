"""One documentation string in, its clean English paragraphs out.

Three passes: blocks that are not prose go, the rest is split into paragraphs, markup inside lines
goes. Only what reads like English is kept: a good paragraph lost is better than a bad one kept.
"""

import html
import inspect
import re
from collections.abc import Iterator

_BLOCKS: tuple[tuple[re.Pattern[str], str], ...] = (
    # Fenced code, HTML comments, doctests and IPython sessions up to the next blank line.
    (re.compile(r"(?ms)^ *(```|~~~).*?(^ *\1 *$|\Z)"), "\n"),
    (re.compile(r"(?s)<!--.*?-->|<(pre|code|table)\b.*?</\1>"), "\n"),
    (re.compile(r"(?m)^ *(>>>|In \[\d+\]|\$ ).*(\n *\S.*)*"), "\n"),
    # Titles with their underlines; then lines that draw a table or a rule.
    (re.compile(r"(?m)^ *\S.{0,80}\n *([=\-~^\"'`#*+:.])\1{2,} *$"), "\n"),
    (re.compile(r"(?m)^ *#{1,6} .*$"), "\n"),
    (re.compile(r"(?m)^ *(\||\+[-=+]{2,}|([=\-~*_#])\2{2,}).*$"), "\n"),
    # Directives that hold prose lose their first word, all others and comments go with their body.
    (
        re.compile(
            r"(?m)^( *)\.\. *(?:note|warning|caution|important|tip|hint|attention|danger|seealso|"
            r"version\w+|deprecated)::(?: *\d[\w.]*(?:\.\.\. )?$)?"
        ),
        r"\n\1",
    ),
    (re.compile(r"(?m)^( *)\.\.(?:[ \[].*)?\n(?:(?:\1 +\S.*)?\n)*"), "\n"),
    # A literal block: everything indented deeper than the line that ends in two colons.
    (re.compile(r"(?m)^( *)((?:\S.*)?\S) ?::\n(?:(?:\1 +\S.*)?\n)*"), r"\1\2:\n\n"),
)

_ITEM = re.compile(r"(?:[-*+\u2022]|\(?(?:\d{1,2}|[a-z]|#)[.)])\s+(?=\S)")
_FIELD = re.compile(r":[a-z]\w*(?: [^:`]{1,60})?:(?:\s+|$)|[@\\][a-z]\w+(?: \w+:)?\s+")
_NAMED = re.compile(
    r"(?!(?:Note|Warning|Example|Examples|See|Caution|Tip|Important):)"
    r"[`*]{0,2}[\w.*/, ]{1,40}?[`*]{0,2} ?(?:\((?:[^()]|\([^()]*\)){0,80}\))?"
    r" ?(?::|--) +(?=[A-Z\"'`(])"
)
_TYPED = re.compile(r"[*\w.,\[\]` ]{1,60} : .*|[*\w.,`]+(?: [*\w.,`]+){0,2}:")

_INLINE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),
    (re.compile(r"<https?://[^<> ]*>| ?\[#?\w*\]_"), ""),
    (re.compile(r"``?([^`]*)``?_{0,2}"), r"\1"),
    (re.compile(r"\*\*([^*\s](?:[^*]*[^*\s])?)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])"), r"\1"),
    (re.compile(r"</?[a-z][a-z0-9]*(?: [^<>]*)?/?>"), ""),
    (re.compile(r"\\(?=[*_`\\\"'|])"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[,.;:?!)](?:\s|$))"), ""),
)

_FUNCTION_WORDS_TEXT = """
a an and any are as at be been but by can could do does each else for from had has have if in into
is it its may more most must no not of on one only or other over same should so some such than that
the their them then there these they this those to under up use used using was we were what when
where which while who will with would you your
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*")
_NEVER = re.compile(r"http|&\w+;")
_ODD = re.compile(r"www\.|[{}<>|\\=~^@$#\[\]*`]|__|::|->|\.\.\.\.|\ufffd")
_BEGINS = re.compile(r"[\"'(\u201c]?[A-Z]")
_ENDS = re.compile(r"[.!?:][\"')\u201d]*$")


def paragraphs(text: str) -> Iterator[str]:
    """The English paragraphs of the documentation string `text`, each on one line."""
    text = inspect.cleandoc(text.replace("\r\n", "\n")) + "\n"
    for pattern, replacement in _BLOCKS:
        text = pattern.sub(replacement, text)
    for block in _split(text):
        cleaned = _inline(block)
        if is_english(cleaned):
            yield cleaned


def is_english(paragraph: str) -> bool:
    """Whether `paragraph` reads like English sentences with little else in between."""
    if len(paragraph) < 25 or not (_BEGINS.match(paragraph) and _ENDS.search(paragraph)):
        return False
    tokens = paragraph.split()
    words = [token for token in tokens if _WORD.fullmatch(token.strip(".,;:!?()\"'\u201c\u201d"))]
    if len(tokens) < 5 or len(words) < 0.85 * len(tokens):
        return False
    common = sum(token.lower().strip(".,;:") in _FUNCTION_WORDS for token in tokens)
    odd = len(_ODD.findall(paragraph))
    ascii_letters = sum(character.isascii() for character in paragraph)
    return (
        common >= 0.2 * len(tokens)
        and odd <= 0.05 * len(tokens)
        and not _NEVER.search(paragraph)
        and ascii_letters >= 0.97 * len(paragraph)
    )


def _split(text: str) -> Iterator[str]:
    """Blocks of running text: cut at blank lines, list items, fields and changes of indent."""
    block: list[str] = []
    indent, hanging = 0, False
    for line in text.expandtabs(4).split("\n"):
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        start = _start(bare, ended=not block or block[-1].endswith((".", ":", ")")))
        if block and (
            not bare or start != 0 or (depth != indent and not (hanging and depth > indent))
        ):
            yield " ".join(block)
            block = []
        if not bare or _TYPED.fullmatch(bare):
            block = []
            continue
        if block and hanging and depth > indent:
            hanging = False
        elif not block:
            hanging = start > 0
        indent = depth
        block.append(bare[max(start, 0) :])
    if block:
        yield " ".join(block)


def _start(line: str, *, ended: bool) -> int:
    """Length of the list or field mark at the start of `line`; 0: it does not start a block."""
    for pattern in (_ITEM, _FIELD):
        if match := pattern.match(line):
            return match.end() + (_start(line[match.end() :], ended=True) if match.end() else 0)
    if ended and (match := _NAMED.match(line)):
        return match.end()
    return 0


def _inline(block: str) -> str:
    for pattern, replacement in _INLINE:
        block = pattern.sub(replacement, block)
    return html.unescape(block).replace("\u00a0", " ").strip()
