"""Numbers in sentences."""


def pluralize(number: int, noun: str, plural: str = "s") -> str:
    """A number with its noun: "1 caption", "2 captions"."""
    return f"{number} {noun}{plural * (number != 1)}"
