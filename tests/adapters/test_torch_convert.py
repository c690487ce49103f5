"""The client's documented conversion of real tensors."""

from __future__ import annotations

import numpy as np
import torch

from branchkey_integrations.client import Client


def test_converted_parameters_are_exact_copies_in_order() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.data = torch.tensor([1.5, -0.25]).to(torch.bfloat16)
    client = Client.__new__(Client)  # the conversion asks nothing of the platform
    weighting, arrays = client.convert_pytorch_numpy(model.named_parameters(), 5)
    weight = model.weight.detach().clone().numpy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert weighting == 5
    assert [(array.shape, array.dtype.name) for array in arrays] == [((2, 3), "float32"), ((2,), "float32")]
    np.testing.assert_array_equal(arrays[0], weight)
    np.testing.assert_array_equal(arrays[1], np.array([1.5, -0.25], "f4"))
    assert all(array.flags.writeable for array in arrays)
