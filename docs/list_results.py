"""docs/leaderboard.qmd: its prose is docs/_leaderboard.md, its table and plot are made from assignments/leaderboard/results.jsonl."""
from pathlib import Path


def render_leaderboard(root: Path) -> str:
    "The page, with table and plot in the place of the block `::: board`."
    from nanochat.leaderboard import render_board  # after the export, which may have written it just now

    page = (root / "docs" / "_leaderboard.md").read_text(encoding="utf-8")
    page = page.replace("::: board\n:::", render_board(root / "assignments" / "leaderboard"), 1)
    note = "<!-- make export writes this page from docs/_leaderboard.md and the leaderboard's results: change the former -->"
    return page.replace("\n---\n", f"\n---\n\n{note}\n", 1)
