"""Foreign lines in rows.jsonl and scores.jsonl do not stop a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jitaccel.evaluation.study import _is_row, read_lines

FOREIGN = (
    b"", b"not json", b"[]", b"null", b"3", b'"method"', b"\xff\xfe", b"{}", b'{"method": "7x"}', b"[" * 100_000,
    b'{"method": 3, "prompt": "a", "prompt_index": 0, "config": null}',
    b'{"method": "7x", "prompt": "a", "prompt_index": "0", "config": null}',
    b'{"method": "7x", "prompt": "a", "prompt_index": true, "config": null}',
    b'{"method": "7x", "prompt": "a", "prompt_index": 0, "config": [1]}',
    b'{"method": "7x", "prompt": ["a"], "prompt_index": 0, "config": null}',
    b'{"method": "7x", "prompt": "a", "prom',
)  # fmt: skip
OWN = {"method": "7x", "prompt": "a", "prompt_index": 0, "config": {"densities": [1.0]}}


@pytest.mark.parametrize("place", range(len(FOREIGN) + 1))
def test_rows_are_found_among_foreign_lines(place: int, tmp_path: Path) -> None:
    own = json.dumps(OWN).encode()
    lines = [*FOREIGN[:place], own, *FOREIGN[place:]]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert [row for row in read_lines(path) if _is_row(row)] == [OWN]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert [*read_lines(tmp_path / "rows.jsonl")] == []
