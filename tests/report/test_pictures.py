"""Pictures: shades that say how much uptake there is."""

import numpy as np

from common.report import pictures


def test_no_uptake_over_ct_is_grey_or_white_and_more_is_always_lighter():
    suv = np.linspace(2.0, 40.0, 200)
    rgb_of_suv = pictures.overlay_rgb(suv)
    assert np.ptp(rgb_of_suv, axis=1).min() > 60
    linear = (rgb_of_suv / 255) ** 2.2
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance[suv < pictures.BLACK_AT_SUV]) > 0).all()
