"""A raw study as `read_study` reads it, with all three images kept."""

from types import SimpleNamespace

from common.geometry import Image
from common.raw.roles import Roles
from common.raw.study import Conversion, plan_study, read_study


def read_images(roles: Roles, conversion: Conversion) -> SimpleNamespace:
    """Return its `ct`, `pet` and `mask`, and what is told of them as of `ReadStudy`."""
    images: dict[str, Image] = {}

    def keep(role: str, image: Image) -> None:
        images[role] = Image(image.data.copy(order="K"), image.affine)

    study = read_study(plan_study(roles, conversion), keep)
    return SimpleNamespace(
        ct=images["ct"],
        pet=images["petsuv"],
        mask=images["mask"],
        suv=study.suv,
        record=study.record,
        warnings=study.warnings,
        taken=study.taken,
    )
