"""The colours of all charts: told apart by the colour blind, on a light and on a dark page.

Lines take Okabe and Ito's colours (jfly.uni-koeln.de/color), darkened for a light page, and differ in their dashes as
well. Scales are cividis (Nunez et al., PLoS ONE 2018), which is read by its lightness alone.
"""

from matplotlib import colormaps
from matplotlib.colors import to_hex

__all__ = ["DARK_SERIES", "DASHES", "LIGHT_SERIES", "ramp"]

LIGHT_SERIES = ("#0065a3", "#b84a00", "#00724f", "#9c4a80")
DARK_SERIES = ("#56b4e9", "#f0a04b", "#2fc79a", "#e39bc6")
DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3))


def ramp(count: int, first: float = 0.0, last: float = 1.0) -> list[str]:
    """So many colours of cividis as #rrggbb, from the share `first` of the scale to the share `last`."""
    span = max(count - 1, 1)
    return [to_hex(colormaps["cividis"](first + (last - first) * number / span)) for number in range(count)]
