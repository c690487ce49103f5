"""The code blocks of the platform's client documentation, as they stand there; only the indentation is put back.

`run` executes a block with the import of our client in place of the official one. What stands for the reader's own values
(ids, layers, host) is replaced by name, and a replacement that finds nothing is an error: the blocks stay as documented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from branchkey_integrations import Client
from branchkey_integrations.sandbox import Sandbox

OFFICIAL_IMPORT = "from branchkey.client import Client"
OUR_IMPORT = "from branchkey_integrations import Client"
PLATFORM = "https://app.branchkey.com"

CREDENTIALS = """
credentials = {
    "id": "your-leaf-uuid",
    "name": "my-client",
    "session_token": "your-session-token-uuid",
    "owner_id": "your-user-uuid",
    "tree_id": "your-tree-uuid",
    "branch_id": "your-branch-uuid"
}
"""

CLIENT = """
from branchkey.client import Client
client = Client(credentials, host="https://app.branchkey.com")
"""

UPLOAD = """
import numpy as np
weighting = 1000
parameters = [layer1_weights, layer2_weights, ...]
file_path = client.save_weights("model_weights", weighting, parameters)
file_id = client.file_upload(file_path)
print(f"Uploaded: {file_id}")
"""

DOWNLOAD = """
if not client.queue.empty():
    aggregation_id = client.queue.get(block=False)
    client.file_download(aggregation_id)
"""

OPTIONS = """
client = Client(
    credentials,
    host="https://app.branchkey.com",
    rbmq_host=None,
    rbmq_port=5672,
    ssl=True,
    wait_for_run=False,
    run_check_interval_s=30,
    proxies=None
)
"""

STRUCTURE = """
weighting = 1000
parameters = [layer1, layer2, ...]
"""

BY_SAMPLES = "weighting = len(train_dataset)"
EQUAL = "weighting = 1"
BY_QUALITY = """
validation_accuracy = 0.85
weighting = len(train_dataset) * validation_accuracy
"""
MANUAL = "weighting = 5.0"

PYTORCH_BY_HAND = """
import numpy as np
weighting = len(train_dataset)
parameters = []
for name, param in model.named_parameters():
    parameters.append(param.data.cpu().detach().numpy())
file_path = client.save_weights("model_weights", weighting, parameters)
file_id = client.file_upload(file_path)
"""

PYTORCH_CONVERTED = """
weighting, parameters = client.convert_pytorch_numpy(
    model.named_parameters(),
    weighting=len(train_dataset)
)
file_path = client.save_weights("model_weights", weighting, parameters)
file_id = client.file_upload(file_path)
"""

KERAS = """
import numpy as np
weighting = len(train_dataset)
parameters = [layer.numpy() for layer in model.trainable_weights]
file_path = client.save_weights("model_weights", weighting, parameters)
file_id = client.file_upload(file_path)
"""

MANUAL_NPZ = """
import numpy as np
arrays_dict = {'weighting': np.array([weighting], dtype=np.float64)}
for i, arr in enumerate(parameters):
    arrays_dict[f'layer_{i}'] = arr
np.savez_compressed("model_weights.npz", **arrays_dict)
"""

READ_AGGREGATE = """
npz_data = np.load("aggregated_files/aggregation_id.npz")
layer_keys = sorted([k for k in npz_data.files if k.startswith('layer_')])
parameters = [npz_data[k] for k in layer_keys]
"""

LOAD_INTO_MODEL = """
for i, param in enumerate(model.parameters()):
    param.data = torch.from_numpy(parameters[i])
"""

METRICS = """
import json
metrics = {"accuracy": 0.95, "loss": 0.12}
client.send_performance_metrics(
    aggregation_id="aggregation-uuid",
    data=json.dumps(metrics),
    mode="test"
)
"""

PROPERTIES = """
client.run_status
client.run_number
client.leaf_id
client.branch_id
client.is_authenticated
"""

PROXIES = """
proxies = {
    'http': 'http://user:password@proxy.example.com:8080',
    'https': 'http://user:password@proxy.example.com:8080',
}
client = Client(credentials, host="https://app.branchkey.com", proxies=proxies)
"""


def adapted(block: str, replacements: Mapping[str, str] | None = None) -> str:
    """Give a block with our import, and with the reader's own values filled in."""
    text = block.replace(OFFICIAL_IMPORT, OUR_IMPORT)
    for old, new in (replacements or {}).items():
        assert old in text, f"the documented block has no {old!r}"
        text = text.replace(old, new)
    return text


def run(block: str, replacements: Mapping[str, str] | None = None, **names: Any) -> dict[str, Any]:
    """Execute a block with ``names`` defined, and give all names that are defined after it."""
    exec(compile(adapted(block, replacements), "<documentation>", "exec"), names)
    return names


@dataclass
class Branch:
    """A sandbox of one leaf, and how that leaf's client is told where the broker is (nothing: it uses WebSocket)."""

    sandbox: Sandbox
    channel: str
    broker: dict[str, Any] = field(default_factory=dict)

    @property
    def credentials(self) -> dict[str, str]:
        return self.sandbox.credentials[0].to_dict()

    def client(self, **options: Any) -> Client:
        return Client(self.credentials, host=self.sandbox.url, **{**self.broker, **options})


def saved(client: Client) -> str:
    return client.save_weights("model_weights", 1, [np.ones(2, "f4")])
