"""The one exception type for mistakes a user can mend."""


class QVLMError(ValueError):
    """A bad argument, file or combination; the message is one line that says what was wrong and what is allowed."""
