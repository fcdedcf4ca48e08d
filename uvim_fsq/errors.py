"""The one exception for a user's mistake: the command line prints its text as one line and exits with code 2."""


class UserError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do.

    Raised for bad input of every kind (paths, keys, values, files). Library callers can catch it as a `ValueError`.
    """
