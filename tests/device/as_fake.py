"""`python as_fake.py LIBRARY arguments`: casp_pl on the device of fake_device.cpp, in place of a GPU."""

import contextlib
import sys
import types
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy

NAME = "fake"


def register(library: str) -> None:
    """Load the device; it is `torch.device("fake", 0)` then."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library)
    given: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "device": lambda _: contextlib.nullcontext(),
    }
    module = types.ModuleType(NAME)
    vars(module).update(given)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay so, as on their way to a GPU
    clone = torch.UntypedStorage.clone  # copies bytes in a way that is for the devices that torch knows

    def cloned(self: torch.UntypedStorage) -> torch.UntypedStorage:
        if self.device.type != NAME:
            return clone(self)
        whole = torch.empty(0, dtype=torch.uint8, device=self.device)
        whole.set_(self)
        return whole.clone().untyped_storage()

    torch.UntypedStorage.clone = cloned


class FakeAccelerator(Accelerator):
    """For `trainer.accelerator: fake`."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do."""

    def teardown(self) -> None:
        """Nothing to do."""

    def get_device_stats(self, device: torch.device) -> dict[str, Any]:
        """None."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """The only one."""
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The only one."""
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        """1."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """It is."""
        return True

    @staticmethod
    def name() -> str:
        """In a recipe."""
        return NAME


def run(arguments: list[str]) -> int:
    """casp_pl's command, told that this device is the one that the recipe's trainer wants."""
    import casp_pl.pipeline.estimate
    import casp_pl.pipeline.prepare
    import casp_pl.pipeline.stage_forecast
    import casp_pl.pipeline.trainers
    from casp_pl.cli import main

    AcceleratorRegistry.register(NAME, FakeAccelerator)
    casp_pl.pipeline.prepare.wanted_device = lambda _: torch.device(NAME, 0)
    for module in (casp_pl.pipeline.prepare, casp_pl.pipeline.estimate, casp_pl.pipeline.stage_forecast):
        module.is_here = lambda _: True
    casp_pl.pipeline.trainers.plain_strategy = lambda _: SingleDeviceStrategy(device=torch.device(NAME, 0))
    return main([*arguments, "--trainer.accelerator", NAME])


if __name__ == "__main__":
    register(sys.argv[1])
    sys.exit(run(sys.argv[2:]))
