"""Bits that the user gives to linears by parts of their names."""

from collections.abc import Mapping, Sequence

from casp_pl.allocation.accounting import BitCosts
from casp_pl.errors import ConfigError
from casp_pl.quantizers.name_parts import names_with

__all__ = ["override_bits"]


def override_bits(
    names: Sequence[str], overrides: Mapping[str, int], quantizer: BitCosts
) -> dict[str, tuple[int, str]]:
    """Full name -> bits and the pattern that gives them, of every linear that one matches.

    A pattern is a part of a full name, whole words between dots: `mlp.down_proj`, `layers.0`, not `layers.0.mlp.d`. Of
    several that match, the last counts.

    Args:
        names: of all linears.
        overrides: pattern to bits.
        quantizer: tells its levels.

    Raises:
        ConfigError: a pattern matches nothing, or the quantizer does not have its bits.
    """
    chosen: dict[str, tuple[int, str]] = {}
    for pattern, bits in overrides.items():
        found = names_with(pattern, names, "bits.overrides")
        if bits not in quantizer.levels:
            levels = ", ".join(map(str, quantizer.levels))
            raise ConfigError(f"bits.overrides: {quantizer.name} cannot do {bits} bits for '{pattern}', only {levels}.")
        chosen |= dict.fromkeys(found, (bits, pattern))
    return chosen
