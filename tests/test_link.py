"""The application over a shaped link between two network namespaces: what the edge measures of its uploads."""

from pathlib import Path

import pytest

from benchmarks import link, link_net
from benchmarks.link import Measured, Upload

pytestmark = pytest.mark.cluster


def test_no_upload_is_faster_than_its_link(tmp_path: Path) -> None:
    """At two rates; how much slower it is, `python -m benchmarks.link` tells, for that wants a quiet machine."""
    if (reason := link_net.why_not()) is not None:
        pytest.skip(reason)
    body = link.bodies()[0]
    assert len(body) > 1_000_000
    with link.deployed(tmp_path) as served:
        assert served.nodes["edge"] != served.nodes["cloud"]
        for profile in ("wifi", "lte"):
            found = link.measure(served, profile, 1, [body])
            (upload,) = found.uploads
            assert upload.modelled == pytest.approx(8 * len(body) / 1e6 / link.LINKS[profile])
            assert upload.measured > 0.97 * upload.modelled, "the bucket holds no more than 15 kB"
        name = served.link.name
    assert not list(Path("/run/netns").glob(f"{name}*")), "the namespaces are gone"


def test_a_rate_that_is_off_is_marked() -> None:
    slow = Measured("lte", 5.85, [Upload(1_000_000, 1.7, 1.4, 0.1)], 1.03)
    fine = Measured("3g", 1.1, [Upload(1_000_000, 7.5, 7.3, 0.1)], 1.03)
    assert (slow.kept, fine.kept) == (False, True)
    text = link.page([slow, fine], 1)
    assert "| lte | 5.85 | 1 | 0.588 | 1.214 | 1.214 | 1.214 | 1.030 | **no** |" in text
    assert "| 3g | 1.1 | 1 | 0.133 | 1.027 | 1.027 | 1.027 | 1.030 | yes |" in text
