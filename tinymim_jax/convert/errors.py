"""The error that all of this package raises, and how text from a file is printed."""


class ConvertError(ValueError):
    """A weights file cannot be read, or does not fit the model it should; the message says what to do."""


def printable(text: object, limit: int = 120) -> str:
    """Text from a file, fit for a terminal: no control characters, and no longer than `limit`."""
    shown = str(text)[:limit]
    return shown if shown.isascii() and shown.isprintable() else ascii(shown)
