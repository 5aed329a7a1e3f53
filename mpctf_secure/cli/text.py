"""Text on its way to a terminal."""


def one_line(text: str) -> str:
    """Without the control characters that a peer may have put into it: they could rewrite what an operator sees."""
    return "".join(character if character.isprintable() else " " for character in text)
