"""What a command tells its user in one line."""


class CommandError(Exception):
    """Arguments that a command cannot run with, or a file or package that it lacks."""
