"""The two ways a case ends without a number, and the error a user can mend."""

from .foreign_text import MESSAGE_LIMIT, visible


class UserError(ValueError):
    """Bad input. The message names the option, the value and the mend; the plugin turns it into a usage error.

    It repeats names and values that others wrote, so it is made `visible`, one line, here once for every place that shows it.
    """

    def __init__(self, message: object) -> None:
        super().__init__(visible(message, MESSAGE_LIMIT))


class CaseSkipped(Exception):
    """The case cannot run here: a missing dependency, device or artefact. The message is the reason."""


class CaseInvalid(Exception):
    """The case breaks a rule or produced a number that cannot be true. The message names the rule."""
