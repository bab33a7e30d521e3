"""What a launcher refuses, in one line."""


class LaunchError(ValueError):
    """A job can't be launched or looked after; the message says what is wrong and what to do."""


class Damaged(LaunchError):
    """A record is not what was written: nobody knows what it said, and asking again does not change that."""


class Held(LaunchError):
    """Another process holds what one at a time may hold."""
