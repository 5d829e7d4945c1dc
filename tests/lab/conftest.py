"""What a laboratory needs: skipped with the reason where it is missing, but not in CI."""

from __future__ import annotations

from functools import cache

import pytest

from lbgym.lab.base import LabError, check_root
from lbgym.lab.cgroups import missing_controllers
from lbgym.lab.data_planes import DATA_PLANES
from lbgym.lab.namespaces import missing_tools
from lbgym.lab.servers import SERVER_KINDS
from tests.privileges import skip_if


@cache
def missing(plane: str) -> str:
    """Why no laboratory with this data plane can be set up here; empty if one can."""
    try:
        check_root()
    except LabError as error:
        return str(error)
    parts = [*SERVER_KINDS.values(), DATA_PLANES[plane]]
    reasons = [missing_tools(), missing_controllers(), *(part.missing() for part in parts)]
    return next((reason for reason in reasons if reason), "")


@pytest.fixture(autouse=True)
def _needs_lab(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("lab")
    if marker is not None:
        (plane,) = marker.args or ("xdp",)
        skip_if(missing(plane), "the tests of the laboratory")
