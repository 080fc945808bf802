"""The drawing of the package's rooms, made from its imports: `python book/rooms.py` draws it again, a test compares."""
import sys
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "book" / "pictures" / "rooms.svg"
WIDTH, GAP, LINE = 440, 26, 15
sys.path.insert(0, str(ROOT / "tests"))

import test_layout as layout  # noqa: E402


def room_imports() -> dict[str, set[str]]:
    """Every room with the other rooms that its modules import."""
    found = {layout.room_of(name): set() for name in sorted(layout.NAMES)}
    for path in layout.MODULES:
        room = layout.room_of(layout.name_of(path))
        for other in layout.imported(path):
            while other and other not in layout.NAMES:  # a function's name after its module's
                other = other.rpartition(".")[0]
            if other and layout.room_of(other) != room:
                found[room].add(layout.room_of(other))
    return found


def without_detours(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that no longer way already tells: a → c goes if a → b → c."""
    def reach(room: str) -> set[str]:
        return imports[room] | {far for near in imports[room] for far in reach(near)}

    return {room: {other for other in others if not any(other in reach(near) for near in others - {other})}
            for room, others in imports.items()}


def _about(room: str) -> str:
    if room == "core":
        return ", ".join(layout.CORE)
    folder = layout.PACKAGE / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    first = path.read_text(encoding="utf-8").removeprefix('"""').split("\n")[0].removesuffix('"""')
    return first.replace("`", "").rstrip(".")


def drawing() -> str:
    """The picture as SVG: a box a room, above the rooms that it imports and just below those that import it."""
    imports = room_imports()
    arrows = without_detours(imports)
    lowest: dict[str, int] = {}
    while len(lowest) < len(imports):
        lowest |= {room: max((lowest[other] + 1 for other in others), default=0) for room, others in imports.items()
                   if room not in lowest and others <= lowest.keys()}
    highest = {room: max(lowest[room], min((lowest[by] - 1 for by, others in arrows.items() if room in others), default=0))
               for room in imports}
    boxes, parts, lines, top = {}, [], [], 4
    for level in sorted(set(lowest.values()), reverse=True):
        rooms = sorted((room for room in layout.ROOMS if room in imports and lowest[room] <= level <= highest[room]),
                       key=lambda room: highest[room] > lowest[room])  # a box of several levels is on the right in each
        width = (WIDTH - 8 - 16 * (len(rooms) - 1)) / len(rooms)
        texts = {room: wrap(_about(room), int(width / 6.9)) for room in rooms}
        bottom = top + 28 + LINE * max(map(len, texts.values()))
        for place, room in enumerate(rooms):
            left, first = 4 + place * (width + 16), boxes[room][1] if room in boxes else top
            boxes[room] = (left + width / 2, first, bottom)
            if level > lowest[room]:
                continue
            parts.append(f'<rect x="{left:g}" y="{first:g}" width="{width:g}" height="{bottom - first:g}" rx="5"/>')
            parts.append(f'<text class="name" x="{left + width / 2:g}" y="{first + 18:g}">{escape(room)}</text>')
            parts += [f'<text x="{left + width / 2:g}" y="{first + 35 + LINE * number:g}">{escape(line)}</text>'
                      for number, line in enumerate(texts[room])]
        top = bottom + GAP
    for room, others in arrows.items():
        for other in sorted(others):
            (start, _, bottom), (end, above, _) = boxes[room], boxes[other]
            lines.append(f'<path d="M{start:g} {bottom:g} L{end:g} {above - 5:g}" marker-end="url(#tip)"/>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - GAP + 4:g}" width="{WIDTH}" '
            f'height="{top - GAP + 4:g}" role="img" aria-label="The rooms of the package and what they import">\n'
            "<style>rect{fill:#f3f6fa;stroke:#5b6b7b}text{font:12px sans-serif;text-anchor:middle;fill:#222}"
            ".name{font-weight:bold;font-size:14px}path{stroke:#5b6b7b;fill:none}</style>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" style="fill:#5b6b7b"/></marker></defs>\n<rect style="fill:#fff;stroke:none" '
            f'width="100%" height="100%"/>\n' + "\n".join(lines + parts) + "\n</svg>\n")


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
