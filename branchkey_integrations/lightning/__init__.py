"""Make a Lightning script a leaf of a BranchKey federation, whichever of the two import names it uses.

trainer = Trainer(callbacks=[BranchKeyCallback(client)])
"""

from branchkey_integrations.lightning.flavours import installed_bases

installed_bases()  # before torch is asked for, so that what is missing is told by the extra that brings both

from branchkey_integrations.lightning.callback import BranchKeyCallback  # noqa: E402

__all__ = ["BranchKeyCallback"]
