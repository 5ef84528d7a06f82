"""What a person did wrong, as against what the program did."""


class ConfigError(ValueError):
    """A mistake in a run's settings or data, worded for the person who made it."""
