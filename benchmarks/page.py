""" Pages of which a program writes the figures and a person the rest. """
import os
import re
from pathlib import Path
from typing import Dict, List, Sequence

__all__ = ['table', 'write_parts']


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown table; all columns but the first are aligned to the right."""
    lines: List[Sequence[object]] = [header, ['---', *['--:'] * (len(header) - 1)], *rows]
    return '\n'.join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_parts(page: Path, parts: Dict[str, str]) -> None:
    """Replace what stands between `<!-- begin generated: NAME -->` and `<!-- end generated: NAME -->`.

    Args:
        page: File to change.
        parts: New text by name.

    Raises:
        ValueError: The page has no such markers for a part. It is then left as it was.
    """
    text = page.read_text()
    for name, part in parts.items():
        begin, end = f'<!-- begin generated: {name} -->', f'<!-- end generated: {name} -->'
        pattern = f'{re.escape(begin)}.*?{re.escape(end)}'
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f'{page} has no place for {name}: write {begin} and {end} where it belongs')
        text = re.sub(pattern, lambda match: f'{begin}\n{part}\n{end}', text, flags=re.DOTALL)
    temporary = page.with_suffix('.tmp')
    temporary.write_text(text)
    os.replace(temporary, page)
