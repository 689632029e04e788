"""Tables of Markdown."""


def percent(share: float) -> str:
    """0.973 -> 97.3 %"""
    return f"{100 * share:.1f} %"


def table(*rows: list[str]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
