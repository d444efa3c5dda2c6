"""One self-contained HTML file: plotly, style, scripts and the gathered results in it, nothing fetched from anywhere.

What is gathered is in `gather.py`; how it looks and answers is in template.html, page.css and the scripts beside it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from plotly.offline import get_plotlyjs

from utils import InputError, git_commit, write_text

HERE = Path(__file__).resolve().parent
SCRIPTS = ("base.js", "heat_map.js", "comparison.js", "details.js", "studies.js", "page.js")
LARGEST = 8_000_000  # bytes


def page_text(found: dict) -> str:
    """The whole page as HTML."""
    stamp = {"built": datetime.now(UTC).isoformat(timespec="minutes"), "commit": git_commit()}
    parts = {
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "data": as_json(found | {"page": stamp}),
        "script": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (HERE / "template.html").read_text(encoding="utf-8")
    pieces = []
    for name, part in parts.items():  # cut, not replaced: a part may hold another's mark
        before, mark, text = text.partition(f"<!--{name}-->")
        if not mark:
            raise InputError(f"template.html has no <!--{name}--> (in this order: {', '.join(parts)})")
        pieces += [before, part]
    return "".join([*pieces, text])


def as_json(found: dict) -> str:
    """JSON that may stand inside a script element: no '<' and no line separators, whatever the results hold."""
    text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write_page(found: dict, out: Path) -> Path:
    """Write the page, if it is not too large to be opened comfortably."""
    text = page_text(found)
    size = len(text.encode("utf-8"))
    if size > LARGEST:
        raise InputError(
            f"the page would have {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}; give fewer results folders "
            "with --results"
        )
    write_text(out, text)
    return out
