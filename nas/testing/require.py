"""What every check is made of."""


def require(condition: bool, message: str) -> None:
    """Raise AssertionError unless ``condition``; not an assert statement, because checks hold under ``-O`` too."""
    if not condition:
        raise AssertionError(message)
