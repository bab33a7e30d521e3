"""What a launcher refuses, in one line."""


class LaunchError(ValueError):
    """A job can't be launched or looked after; the message says what is wrong and what to do."""


class Held(LaunchError):
    """Another process holds what one at a time may hold."""
