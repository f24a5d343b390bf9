"""The exception type for mistakes that a user can correct."""


class QVLMError(ValueError):
    """A wrong argument, file or combination; the message is one line that says what is wrong and what is allowed."""
