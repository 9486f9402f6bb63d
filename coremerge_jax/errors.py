"""The errors that a user can meet. Each message names the culprit and says what to do."""


class CoreMergeError(ValueError):
    """Base of every error that this library raises on purpose."""


class FormatError(CoreMergeError):
    """A file or array is malformed: truncated, of the wrong shape, not finite, or incomplete."""


class UnsupportedError(CoreMergeError):
    """A well-formed input that cannot be merged correctly, refused by name."""


class MismatchError(CoreMergeError):
    """Inputs that are fine one by one but do not fit together."""


class RecipeError(CoreMergeError):
    """A rule, space, parameter or option that does not exist, or a value that it cannot have."""
