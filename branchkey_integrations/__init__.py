"""Make any training script a leaf of a BranchKey federation by adding one line.

Importing this package imports no machine learning framework. The adapters are in ``branchkey_integrations.torch``,
``branchkey_integrations.lightning`` and ``branchkey_integrations.keras``; ``branchkey_integrations.sandbox`` is a branch
on this machine to try them with.
"""

from branchkey_integrations import errors
from branchkey_integrations._version import __version__
from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.gate import Gate
from branchkey_integrations.outcome import RoundOutcome

__all__ = ["Client", "Credentials", "Gate", "RoundOutcome", "RetryPolicy", "errors", "__version__"]
