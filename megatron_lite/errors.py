"""Errors a user can act on. Each carries the exit code that the process ends with.

Standard library only: everything may import this module. A ``MegatronLiteError`` is shown as one line without a
traceback; any other exception is a bug of ours and keeps its traceback.
"""


class MegatronLiteError(Exception):
    """Base of all errors meant for the user. ``str(error)`` is the line to print."""

    exit_code = 1


class ConfigError(MegatronLiteError):
    """A wrong command line or config; the message may hold several lines, one for each mistake."""

    exit_code = 2


class DataError(MegatronLiteError):
    """Unreadable, malformed, empty or changed training data."""

    exit_code = 3


class CheckpointError(MegatronLiteError):
    """A checkpoint that is corrupt, incomplete, unsafe, or belongs to another model."""

    exit_code = 4


class PeerError(MegatronLiteError):
    """Another rank died, hung or could not be reached."""

    exit_code = 5


class NonFiniteError(MegatronLiteError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 6


class StorageError(MegatronLiteError):
    """The disk is full, read-only, gone, or returned an I/O error."""

    exit_code = 7


class Preempted(MegatronLiteError):
    """The run was asked to stop, saved its state and can be resumed."""

    exit_code = 75
