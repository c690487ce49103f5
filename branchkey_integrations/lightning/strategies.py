"""Tell which of Lightning's strategies keep a whole model in each process."""

from __future__ import annotations

from typing import Any

from branchkey_integrations.errors import ConfigurationError

#: Some of these inherit from a strategy that is served, so they are looked for first.
_SHARDED = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "XLAFSDPStrategy"})
_WHOLE = frozenset({"SingleDeviceStrategy", "DDPStrategy"})


def require_whole_model(strategy: Any) -> None:
    """Refuse a strategy under which no process holds the whole model.

    Raises:
        ConfigurationError: names the strategy.
    """
    # By name, since the two flavours have unrelated classes.
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if names & _SHARDED or not names & _WHOLE:
        raise ConfigurationError(
            what="strategy",
            expected="one that keeps the whole model in each process: a single device, or DDP",
            found=type(strategy).__name__,
            fix='Use Trainer(strategy="ddp") or strategy="auto"',
        )
