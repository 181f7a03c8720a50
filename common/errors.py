"""What the user's input raises, everywhere in the house."""


class ConfigError(ValueError):
    """The user's input cannot be used; the message says what was given, what was expected and the remedy."""
