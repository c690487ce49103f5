"""What tests of adapters share. What the installed version of a framework does not have yet, no test asks for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pytest

# By its number, since importing it takes seconds that the tests of other frameworks can do without.
_LIGHTNING = tuple(int(part) for part in version("lightning").split(".")[:2])

collect_ignore = ["test_lightning_moving_averages.py"] if _LIGHTNING < (2, 6) else []


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"not collected, since Lightning is older than 2.6: {name}" for name in collect_ignore]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make this process a torch process group of its own."""
    import torch.distributed as dist  # only where it is asked for: it takes seconds

    patch = pytest.MonkeyPatch()
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()
    patch.undo()
