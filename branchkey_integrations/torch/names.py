"""Give a parameter the name its author gave it, whatever wraps the model today.

A leaf that trains under DDP and one that does not must describe the same layers. Wrappers put a component of their own
into every name below them, at the front or, for a compiled submodule, in the middle. Only components that a wrapper put
there are taken out: a user's own submodule called ``module`` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

#: The child in which a wrapper keeps what it wraps, by class name, so that no wrapper has to be imported to be known.
_WRAPPED_CHILD = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",  # activation checkpointing and offloading
    "_FabricModule": "_forward_module",
}
#: A user's own class may be called as a wrapper is; the wrappers live in these packages.
_WRAPPER_PACKAGES = ("torch", "lightning", "lightning_fabric")


def wrapped_child(module: nn.Module) -> str | None:
    """Give the attribute under which ``module`` keeps the module it wraps; None when it is no wrapper."""
    for cls in type(module).__mro__:
        child = _WRAPPED_CHILD.get(cls.__name__)
        if child is not None and cls.__module__.split(".")[0] in _WRAPPER_PACKAGES:
            return child
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """Give the user's own module under any number of wrappers."""
    child = wrapped_child(module)
    while child is not None:
        module = getattr(module, child)
        child = wrapped_child(module)
    return module


def is_fully_sharded(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` (FSDP2) was applied to ``module`` itself; it changes the module's class."""
    return any(cls.__name__ == "FSDPModule" and cls.__module__.startswith("torch.") for cls in type(module).__mro__)


class CanonicalNames:
    """Translate names of one module's parameters and buffers, as ``named_parameters()`` gives them, into canonical ones."""

    def __init__(self, root: nn.Module) -> None:
        self._added = set()
        # Duplicates are kept: a shared submodule is met under each of its names, and any of them may lead to a parameter.
        for path, module in root.named_modules(remove_duplicate=False):
            child = wrapped_child(module)
            if child is not None:
                self._added.add(f"{path}.{child}" if path else child)

    def __call__(self, name: str) -> str:
        """Give the canonical form of ``name``."""
        if not self._added:
            return name
        kept = []
        path = ""
        for part in name.split("."):
            path = f"{path}.{part}" if path else part
            if path not in self._added:
                kept.append(part)
        return ".".join(kept)


def persistent_buffers(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List each buffer that belongs to the checkpoint once, by its raw name, in the order of the modules.

    Buffers registered with ``persistent=False`` are left out: they are caches that every site derives for itself, and
    their shape may follow the data.
    """
    seen = set()
    for path, module in root.named_modules():
        caches = module._non_persistent_buffers_set  # noqa: SLF001  torch has no public way to ask
        for name, buffer in module.named_buffers(recurse=False):
            if name not in caches and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{path}.{name}" if path else name), buffer
