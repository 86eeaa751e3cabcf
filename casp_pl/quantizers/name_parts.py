"""Settings that the user gives to linears by parts of their names.

A part is whole words between dots: `mlp.down_proj` and `layers.0` are parts of `model.layers.0.mlp.down_proj`, and
`layers.0.mlp.d` is not. Of several that a name has, the last one given counts.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from casp_pl.errors import ConfigError

__all__ = ["names_with", "setting_of"]

T = TypeVar("T")


def names_with(part: str, names: Sequence[str], setting: str) -> list[str]:
    """All full names that have this part.

    Args:
        part: words between dots.
        names: of all linears, at least one.
        setting: the key in the recipe, for the message.

    Raises:
        ConfigError: there is none.
    """
    found = [name for name in names if _has(name, part)]
    if not found:
        raise ConfigError(f"{setting}: no linear has '{part}' in its name; one is called {names[0]}.")
    return found


def setting_of(name: str, settings: Mapping[str, T], otherwise: T) -> T:
    """The setting of the linear with this full name; `otherwise` where it has none of the parts."""
    found = [value for part, value in settings.items() if _has(name, part)]
    return found[-1] if found else otherwise


def _has(name: str, part: str) -> bool:
    return f".{part.strip('.')}." in f".{name}."
