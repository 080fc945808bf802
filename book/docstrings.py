"""Docstrings as the package writes them, plain text laid out by hand, into what Sphinx reads. A Sphinx extension."""
import re
from itertools import groupby

SECTION = re.compile(r"(Args|Raises|Returns|Yields|Attributes|Example|Examples):\s*$")
SETTING = re.compile(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): ")
CODE = re.compile(r"(`[^`\n]*`|(?<![\w*])\*[A-Za-z][^*\n]*\*(?!\w))")
SPECIAL = re.compile(r"([|*\\]|_\b|`)")


def _escaped(line):
    """Everything means itself but what is between back-ticks, and *emphasis*."""
    return "".join(part if CODE.fullmatch(part) else SPECIAL.sub(r"\\\1", part) for part in CODE.split(line))


def _indented(line):
    return line.startswith(" ")


def as_text(block):
    """One block of lines between blank ones."""
    first, later = block[0], block[1:]
    if SECTION.match(first):
        return [first, *map(_escaped, later)]
    if not _indented(first) and all(_indented(line) or SETTING.match(line) for line in block) and (
            any(map(_indented, later)) or sum(bool(SETTING.match(line)) for line in block) > 1):
        return [f"  {_escaped(line.strip())}" if _indented(line) else
                f"- **{_escaped(SETTING.match(line)[1])}**: {_escaped(line[SETTING.match(line).end():])}" for line in block]
    if first.startswith(("|", " ")) or any(map(_indented, later)) or sum("  " in line.strip() for line in block) > 1:
        return ["::", "", *(f"    {line}" for line in block)]
    return [_escaped(line) for line in block]


def plain(app, what, name, obj, options, lines):
    """Rewrite a docstring's lines in place."""
    blocks = [list(block) for blank, block in groupby(lines, key=lambda line: not line.strip()) if not blank]
    in_section, text = False, []
    for block in blocks:
        in_section = bool(SECTION.match(block[0])) or in_section and _indented(block[0])
        text += [*(map(_escaped, block) if in_section else as_text(block)), ""]
    lines[:] = text


def setup(app):
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
