"""The one exception for mistakes that a user can correct. It is raised where the mistake is found and printed by main.py."""
import re


class UserError(Exception):
    """A mistake that the user can correct. The message is one sentence: what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without TensorFlow's decoration."""
    return re.sub(r'\{\{.*?\}\} ?| ?\[Op:.*', '', str(error).splitlines()[0]).strip() if str(error) else type(error).__name__
