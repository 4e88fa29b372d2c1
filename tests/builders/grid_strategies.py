"""Voxel grids for hypothesis to draw: any axis order, flips, spacings and origins.

TUMORVOLUME_STRESS=200 makes every property test that many times longer.
"""

import os

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from common.geometry import Grid

STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))
SPACINGS = (0.5, 0.9765625, 1.0, 1.171875, 1.5, 2.0, 2.03642, 3.0, 3.27, 4.07283, 5.0)
shapes = st.tuples(*[st.integers(1, 14)] * 3)
seeds = st.integers(0, 2**32 - 1)


def examples(count):
    return settings(max_examples=count * STRESS, deadline=None, derandomize=True, database=None)


@st.composite
def grids(draw, shape=shapes, oblique=False):
    """Any axis order, flips, spacings and origin; with `oblique` turned about two axes."""
    affine = np.zeros((4, 4))
    for array_axis, space_axis in enumerate(draw(st.permutations(range(3)))):
        sign = draw(st.sampled_from((-1, 1)))
        affine[space_axis, array_axis] = sign * draw(st.sampled_from(SPACINGS))
    origin = st.sampled_from((0.0, -250.0, 117.2, -843.3, -249.51171875))
    affine[:, 3] = (*(draw(origin) for _ in range(3)), 1)
    if oblique:
        affine = (
            turn(draw(st.floats(-0.7, 0.7)), 0, 1) @ turn(draw(st.floats(-0.7, 0.7)), 1, 2) @ affine
        )
    return Grid(draw(shape), affine)


def turn(angle, first, second):
    affine = np.eye(4)
    affine[[first, second], [first, second]] = np.cos(angle)
    affine[first, second] = -np.sin(angle)
    affine[second, first] = np.sin(angle)
    return affine
