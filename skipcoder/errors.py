"""The one exception that means "the input is at fault"."""


class UserError(ValueError):
    """Bad input or configuration: the message names the fault and the remedy (exit code 2)."""
