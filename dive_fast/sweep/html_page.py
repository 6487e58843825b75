"""A self-contained HTML page: a table, notes and an image. All text is escaped, and there are no scripts."""

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; margin: 2rem auto; max-width: 72rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #dadce0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
img { max-width: 100%; height: auto; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: nothing is loaded from elsewhere, and nothing is executed."""


def page(
    title: str, cells: Sequence[Sequence[str]], notes: Sequence[str], image: bytes | None, caption: str
) -> str:
    """The page as text.

    Args:
        cells: the table; its first row is the header.
        image: a PNG; None: no image.
        caption: description of the image.
    """
    header, *rows = cells
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    paragraphs = "\n".join(f"<p>{escape(note)}</p>" for note in notes)
    figure = ""
    if image is not None:
        encoded = base64.b64encode(image).decode()
        figure = f'<p><img src="data:image/png;base64,{encoded}" alt="{escape(caption, quote=True)}"></p>\n'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{figure}{table if rows else ''}\n{paragraphs}\n</body>\n</html>\n"
    )
