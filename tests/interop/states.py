"""A state of many kinds, and what compares it."""

import torch


def make_state():
    """Everything that DCP flattens, and tensors of unusual forms."""
    torch.manual_seed(7)
    return {
        "big": torch.randn(300, 400),
        "step": 3,
        "nested": {
            "half": torch.ones(3, dtype=torch.bfloat16),
            "transposed": torch.randn(150, 250).t(),
            "list": [1, "two", {"deep": torch.arange(5)}],
        },
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "fp8": torch.randn(64, 64).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(9).to(torch.uint16),
        "complex": torch.complex(torch.arange(6.0).double(), -torch.arange(6.0).double()),
        "flags": torch.tensor([True, False, True]),
    }


def zeros_like(value):
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: zeros_like(each) for key, each in value.items()}
    if isinstance(value, list):
        return [zeros_like(each) for each in value]
    return type(value)()


def same(one, other):
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
