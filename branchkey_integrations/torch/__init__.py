"""Make a plain PyTorch training loop a leaf of a BranchKey federation.

hook = BranchKeyHook(model, client)
for epoch in range(epochs):
    train(model)
    hook.step(samples=len(dataset), metrics={"loss": loss})
"""

from branchkey_integrations.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401  looked for here, so that its absence is told in one line
except ImportError as error:
    raise MissingDependencyError(
        what="branchkey_integrations.torch",
        expected="PyTorch 2.2 or newer",
        found=str(error),
        fix="Install it with: pip install 'branchkey-integrations[torch]'",
    ) from error

from branchkey_integrations.torch.hook import BranchKeyHook
from branchkey_integrations.torch.parameters import TorchParameters

__all__ = ["BranchKeyHook", "TorchParameters"]
