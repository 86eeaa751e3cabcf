"""The model that a plan will make, without a single number in it: on the meta device, with empty compressed layers."""

import copy
from dataclasses import dataclass
from typing import Any

from casp_pl.allocation import CompressionPlan, ModulePlan
from casp_pl.layers import build_layer
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.surgery import install_layers
from casp_pl.modules.parameters import trainable_parameters
from casp_pl.quantizers import Quantizer
from casp_pl.quantizers.low_rank import low_rank_spec

__all__ = ["CompressedOutline", "compressed_bytes", "compressed_outline", "module_spec", "plan_specs"]


@dataclass(frozen=True)
class CompressedOutline:
    """A model on the meta device with its compressed layers in place.

    Attributes:
        model: the whole model.
        blocks: its decoder blocks.
        trained: names of the parameters that fine-tuning changes.
    """

    model: Any
    blocks: Any
    trained: frozenset[str]


def compressed_outline(adapter: ModelAdapter, plan: CompressionPlan, quantizer: Quantizer) -> CompressedOutline:
    """What a fit with this plan makes of `adapter.model`, which lies on the meta device and stays as it is."""
    model = copy.deepcopy(adapter.model)
    install_layers(model, plan_specs(plan, adapter, quantizer))
    blocks: Any = model.get_submodule(f"{adapter.decoder_name}.layers")
    trainable_parameters(blocks)
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return CompressedOutline(model.requires_grad_(False), blocks, trained)


def compressed_bytes(adapter: ModelAdapter, plan: CompressionPlan, quantizer: Quantizer) -> int:
    """Bytes of all compressed linears in memory."""
    layers = (build_layer(spec, device="meta") for spec in plan_specs(plan, adapter, quantizer).values())
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())


def plan_specs(plan: CompressionPlan, adapter: ModelAdapter, quantizer: Quantizer) -> dict[str, dict[str, Any]]:
    """Full module name to the spec of the layer that a fit with this plan puts there."""
    return {
        module.name: module_spec(module, adapter.model.get_submodule(module.name), quantizer) for module in plan.modules
    }


def module_spec(plan: ModulePlan, linear: Any, quantizer: Quantizer) -> dict[str, Any]:
    """The spec of the layer that takes the place of this linear."""
    settings: dict[str, Any] = {"bits": plan.bits, "bias": linear.bias is not None}
    quantizer = quantizer.for_module(plan.name)
    if plan.rank is None:
        return quantizer.layer_spec(*plan.shape, **settings)
    return low_rank_spec(*plan.shape, plan.rank, quantizer, **settings)
