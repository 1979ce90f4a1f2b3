"""The errors that users meet: each message names what was wrong, what was expected and what to do, in a sentence."""

from __future__ import annotations

from typing import Any


class CLDFError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""


class DataError(CLDFError, ValueError):
    """An input file or array can't be used: corrupt, truncated, wrong shape or geometry, not finite, constant."""


class UnlikeTrainingError(DataError):
    """A study is unlike the images that the networks were trained on, further than a policy allows."""

    def __init__(self, message: str, scores: dict[str, Any]) -> None:
        super().__init__(message)
        self.scores = scores
        """As `deploy.ood.Judgement.to_json` gives them."""


class SplitError(DataError):
    """A split is inconsistent: a patient in two parts, an unknown patient, an empty part."""


class ConfigError(CLDFError, ValueError):
    """A configuration value or combination of values is not allowed."""


class CheckpointError(CLDFError, RuntimeError):
    """A weights file or run directory is missing, incomplete, or does not fit the network it is loaded into."""


class BackendError(CLDFError, RuntimeError):
    """A backend was asked for by name and can't serve the input, or is not available on this machine."""


class IntegrityError(CLDFError, RuntimeError):
    """A deployed file, signature or log is not what its manifest or its chain of hashes says, or can't be trusted."""


class EngineMismatchError(CLDFError, RuntimeError):
    """No engine fits: they were built for another GPU, TensorRT, operating system or precision."""


class ParityError(CLDFError, RuntimeError):
    """An exported graph or engine does not give what the run gives in PyTorch."""
