"""How much carbon an electricity grid emits: facts with their source."""

from __future__ import annotations

# Carbon intensity of the electricity generated in 2023, life cycle, gCO2e/kWh, rounded: Ember (2024) with processing by
# Our World in Data, "Carbon intensity of electricity generation" (CC BY 4.0); `world`: Ember (July 2024).
GRID_SOURCE = "Ember, electricity of 2023"
GRIDS = {
    "world": 481.0,
    "australia": 549.0,
    "austria": 111.0,
    "brazil": 98.0,
    "canada": 170.0,
    "china": 582.0,
    "denmark": 152.0,
    "finland": 79.0,
    "france": 56.0,
    "germany": 381.0,
    "india": 713.0,
    "ireland": 291.0,
    "italy": 331.0,
    "japan": 485.0,
    "netherlands": 268.0,
    "norway": 30.0,
    "poland": 662.0,
    "singapore": 471.0,
    "south-africa": 708.0,
    "south-korea": 431.0,
    "spain": 174.0,
    "sweden": 41.0,
    "switzerland": 35.0,
    "united-kingdom": 238.0,
    "united-states": 369.0,
}


def grid_intensity(grid: float | str) -> float:
    """gCO2e per kWh of a number or of a name in GRIDS. Raises ValueError for another name."""
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise ValueError(
                f"grid={grid!r} must be a number in gCO2e/kWh (look up that of your grid, supplier and year) or one of "
                f"{', '.join(GRIDS)}"
            )
        return GRIDS[grid]
    return grid
