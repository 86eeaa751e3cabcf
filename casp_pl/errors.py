"""Errors that end a run: each has the exit code that scripts read and a message of at most three lines."""

import signal

__all__ = [
    "CaspError",
    "ConfigError",
    "InputError",
    "IntegrityError",
    "NumericsError",
    "ResourceError",
    "StopRun",
]


class CaspError(Exception):
    """Base of all expected failures. The message names the thing and the way out."""

    exit_code = 1


class ConfigError(CaspError):
    """A setting that cannot work: unknown key, wrong type, impossible budget."""

    exit_code = 2


class InputError(CaspError):
    """Missing, empty or broken input data or model files."""

    exit_code = 3


class NumericsError(CaspError):
    """NaN or infinity where a finite number is needed."""

    exit_code = 4


class ResourceError(CaspError):
    """Not enough memory or disk, or an output that cannot be written."""

    exit_code = 5


class IntegrityError(CaspError):
    """A file that is not what its manifest or its format says."""

    exit_code = 6


class StopRun(BaseException):
    """SIGINT or SIGTERM: end at once, files stay whole, the run can go on later."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}: what is finished is saved; the same command goes on from here."
        )
        self.exit_code = 128 + number
