"""A stand-in for a second device: tensors that say to be elsewhere, and refuse to meet one that is on the CPU."""
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")  # a name that needs no hardware; what is there is computed on the CPU


class There(torch.Tensor):
    """A tensor elsewhere, around the one that is computed with."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype, device=THERE,
                                                   requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in given if isinstance(each, There)]
    copies = function in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
    if there and not copies and any(each.dim() for each in given if not isinstance(each, There)):
        raise RuntimeError(f"expected all tensors to be on the same device, in {function}")
    device = kwargs.get("device")
    kwargs = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
    args, kwargs = tree_map(lambda each: each.inner if isinstance(each, There) else each, (args, kwargs))
    found = function(*args, **kwargs)
    known = {id(each.inner): each for each in there}  # what is changed in place stays itself
    goes_there = device.type == THERE.type if device is not None else bool(there)
    return tree_map(lambda each: known[id(each)] if id(each) in known else There(each)
                    if goes_there and isinstance(each, torch.Tensor) else each, found)


@contextlib.contextmanager
def elsewhere(monkeypatch):
    """Within it, `device=THERE` and `.to(THERE)` work as for a real device."""
    generator, autocast = torch.Generator, torch.autocast  # which do not know the name
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **more: autocast("cpu", *args, **more))
    with _Everywhere():
        yield


def moved(model):
    """The model with every weight and buffer elsewhere."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(There(weight.detach()), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = There(buffer)
    return model
