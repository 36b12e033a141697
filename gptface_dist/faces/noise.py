"""Smooth random textures: value noise on a lattice, the same on every run."""

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.mesh import Floats

PERIOD = 32
_TABLE_SEED = 20070


def _table() -> Floats:
    return np.random.Generator(np.random.PCG64(_TABLE_SEED)).random((PERIOD, PERIOD, PERIOD), dtype=np.float32)


TABLE = _table()


def smoothstep(value: Floats, low: float, high: float) -> Floats:
    """0 below ``low``, 1 above ``high``, a cubic between (falling where ``low`` > ``high``)."""
    t = np.clip((value - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def bump(value: Floats, centre: float, width: float) -> Floats:
    """Gaussian of standard deviation ``width``."""
    return np.exp(np.float32(-0.5 / width**2) * (value - np.float32(centre)) ** 2)


def noise(points: Floats) -> Floats:
    """Value noise in 0..1 at points (n, 3); lattice step 1, period 32 along each axis."""
    cell = np.floor(points)
    t = points - cell
    t = t * t * (3 - 2 * t)
    low = cell.astype(np.int32) % PERIOD
    high = (low + 1) % PERIOD
    flat = TABLE.ravel()
    x0, x1 = low[:, 0] * PERIOD * PERIOD, high[:, 0] * PERIOD * PERIOD
    y0, y1 = low[:, 1] * PERIOD, high[:, 1] * PERIOD
    z0, z1 = low[:, 2], high[:, 2]
    tx, ty, tz = t[:, 0], t[:, 1], t[:, 2]

    def along_z(xy: NDArray[np.int32]) -> Floats:
        near = flat[xy + z0]
        return near + (flat[xy + z1] - near) * tz

    near, far = along_z(x0 + y0), along_z(x0 + y1)
    left = near + (far - near) * ty
    near, far = along_z(x1 + y0), along_z(x1 + y1)
    right = near + (far - near) * ty
    return left + (right - left) * tx


def strands(across: Floats, along: Floats, finest: float) -> Floats:
    """Noise in 0..1 drawn out along hair: ``across`` and ``along`` in decimetres, ``finest`` strands a decimetre."""
    coarse = noise(np.stack([across * (finest * 0.3), along * 1.3, np.full_like(across, 3.5)], 1))
    fine = noise(np.stack([across * finest, along * 2.0, np.full_like(across, 9.5)], 1))
    return 0.55 * coarse + 0.45 * fine
