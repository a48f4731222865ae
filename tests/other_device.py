"""A device that is not the CPU, though it computes there, for machines without a GPU.

What would fail on a GPU because tensors of two devices meet, fails on it; what only a GPU can show (its kernels, its
memory, the order of its work) it does not see, nor a number (a 0-d tensor of the CPU) where a GPU wants a tensor of its
own. `install` makes it known to this process as `NAME`, for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"

aten = torch.ops.aten
MAY_MIX = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put_.default, aten.index_put.default}
"""Their first argument may be on another device than the indices, the second; as on a GPU."""

operations = [0]
"""How many ran on the device."""

_libraries: list[torch.library.Library] = []  # a registration ends with its library


class OtherTensor(Tensor):
    """A tensor on the device; ``held`` is where it computes."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OtherTensor:
        made: OtherTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        return run(function, arguments, named or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OtherTensor({self.held!r})"

    def tolist(self) -> Any:
        """Torch refuses it to subclasses."""
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        """As on a GPU.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"a tensor on {self.device} is not in the memory that numpy reads; copy it by .cpu() first")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what it holds, since no other process knows the device."""
        return self.held.detach().__reduce_ex__(protocol)


def run(function: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """One operation.

    Raises:
        RuntimeError: it mixes the device with the CPU where a GPU would refuse that.
    """
    if function.namespace == "mmemb":  # an operator of ours: what it is made of is looked at
        from mmemb.kernels import operator as op

        return getattr(op, f"{function._opname}_op")._init_fn(*arguments, **named)
    operations[0] += 1
    flat, _ = tree_flatten((arguments, named))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    devices = [value for value in flat if isinstance(value, torch.device)]
    if any(isinstance(tensor, OtherTensor) for tensor in tensors) and function not in MAY_MIX:
        indices = [id(each) for each in arguments[1] if each is not None] if function in INDEXED else []
        for tensor in tensors:
            if not isinstance(tensor, OtherTensor) and tensor.ndim and id(tensor) not in indices:
                raise RuntimeError(f"{function} mixes {NAME} with a {tuple(tensor.shape)} tensor on {tensor.device}")
    on_other = devices[0].type == NAME if devices else any(isinstance(tensor, OtherTensor) for tensor in tensors)
    given = {id(_held(tensor)): tensor for tensor in tensors}
    result = function(*tree_map(_held, tuple(arguments)), **tree_map(_held, dict(named)))

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = given.get(id(value))
        if same is not None and (not devices or isinstance(same, OtherTensor) == on_other):
            return same
        value = value if same is None else value.clone()  # a move that was none here
        return OtherTensor(value) if on_other else value

    return tree_map(back, result)


def _held(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.held if isinstance(value, OtherTensor) else value


class _Module:
    """What ``torch.other`` would be."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = manual_seed = set_device = staticmethod(lambda _: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


class OtherAccelerator(Accelerator):
    """For Lightning."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do."""

    def teardown(self) -> None:
        """Nothing to do."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """None."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """There is one."""
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """There is one."""
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        """There is one."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Since `install`."""
        return True

    @staticmethod
    def name() -> str:
        """As torch calls it."""
        return NAME


class OnOther(SingleDeviceStrategy):
    """For Lightning: ``--trainer.strategy other``."""

    strategy_name = NAME

    def __init__(self, **options: Any) -> None:
        super().__init__(device=torch.device(NAME, 0), accelerator=OtherAccelerator(), **options)


def install() -> None:
    """Makes the device known to torch and Lightning."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # else tied weights come apart as a module moves
    library = torch.library.Library("aten", "IMPL")
    for name, operation in _factories():
        library.impl(name, _on_device(operation), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _libraries.append(library)
    AcceleratorRegistry.register(NAME, OtherAccelerator, description="not the CPU, on the CPU")
    StrategyRegistry.register(NAME, OnOther, description="not the CPU, on the CPU")


def _factories() -> Iterator[tuple[str, Any]]:
    """Operations that make a tensor on a device out of none."""
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet, None), overload or "default", None) if space == "aten" else None
        if operation is None or torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"):
            continue
        arguments = operation._schema.arguments
        if any(each.name == "device" for each in arguments) and not any(
            "Tensor" in str(each.type) for each in arguments
        ):
            yield name, operation


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _on_device(operation: Any) -> Callable[..., Any]:
    return lambda *arguments, **named: run(operation, arguments, named)
