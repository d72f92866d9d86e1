"""The one exception a user may cause: its text is the whole message, and the exit status is 2."""


class UserError(Exception):
    """A mistake in the input, the configuration or the surroundings of a command.

    The message names the value, the limit and the fix; `cli.main` prints it without a traceback.
    """
