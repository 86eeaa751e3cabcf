"""What the layouts of other tools have in common: reasons for a refusal."""

from typing import Any, TypeVar

from casp_pl.errors import ConfigError
from casp_pl.layers import QuantizedLinear
from casp_pl.models.surgery import compressed_layers

__all__ = ["layers_of_kind"]

Layer = TypeVar("Layer", bound=QuantizedLinear)


def layers_of_kind(model: Any, kind: type[Layer], layout: str, quantizer: str) -> dict[str, Layer]:
    """All compressed layers, which must be of one kind.

    Args:
        model: the compressed model.
        kind: class of layer that the layout can hold.
        layout: its name, for the message.
        quantizer: that makes such layers, for the message.

    Raises:
        ConfigError: a layer of another kind.
    """
    layers = {}
    for name, layer in compressed_layers(model).items():
        if not isinstance(layer, kind):
            raise ConfigError(
                f"the {layout} layout has no place for {name}, a layer of kind {layer.kind}.\n"
                f"Export as dense or casp, or compress with {quantizer} and --low_rank.mode off."
            )
        layers[name] = layer
    return layers
