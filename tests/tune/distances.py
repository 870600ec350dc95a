"""Functions that a user could name as a metric."""


def total_length(full_text: str, exit_text: str) -> float:
    """No distance at all."""
    return 1.0 + len(full_text) + len(exit_text)
