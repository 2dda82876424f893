from pathlib import Path

from tools import check_links


def test_anchors_are_those_of_github() -> None:
    text = "# A `b_c` and [d](e.md)?\n```\n# comment\n```\n## Twice\n## Twice\n## Was läuft: 1.5x\n"
    assert check_links.anchors(text) == {"a-b_c-and-d", "twice", "twice-1", "was-läuft-15x"}


def test_links(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Some heading\n")
    valid = "[a](b.md) [b](b.md#some-heading) ![c](.) [d](#top) [e](https://x.y/z#w) `[f](none)`\n# Top\n"
    (tmp_path / "a.md").write_text(valid + "```\n[g](none)\n```\n")
    assert check_links.broken_links(tmp_path / "a.md") == []
    broken = "[a](none.md)\n\n[b](b.md#other) [c](#none)\n<img src=\"none.svg\">\n[d]: none\n[e](b.md 'title')"
    (tmp_path / "a.md").write_text(broken)
    assert [line for line, _ in check_links.broken_links(tmp_path / "a.md")] == [1, 3, 3, 4, 5]
