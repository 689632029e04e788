"""Numbers and lists in sentences."""


def pluralize(number: int, noun: str, plural: str = "s") -> str:
    """A number with its noun: "1 caption", "2 captions"."""
    return f"{number} {noun}{plural * (number != 1)}"


def list_some(names: list[str], most: int = 10) -> str:
    """The first names, and the number of the others: `"a, b and 3 others"`."""
    more = f" and {pluralize(len(names) - most, 'other')}" if len(names) > most else ""
    return ", ".join(names[:most]) + more
