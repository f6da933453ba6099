"""A training that is killed while its checkpoint goes up to S3 goes on from the newest one that is whole there."""

from pathlib import Path

import pytest

from benchmarks import kills
from benchmarks.kills import Kill, Left, Moment, Session

pytestmark = pytest.mark.cluster


def test_resumes_after_kills_inside_uploads(tmp_path: Path) -> None:
    """Of 61 MB, once 20 and once 45 MB are on their way; last the run ends with each epoch once."""
    done = kills.session(tmp_path, [Moment(megabytes=20), Moment(megabytes=45)], seed=0, upload_mb_s=10)
    assert all(kill.in_upload for kill in done.kills), done
    assert all(kill.megabytes > 50 for kill in done.kills), done
    assert all(kill.right for kill in done.kills), done
    assert done.epochs == 8, "one of main, one of extension, six of cloud"


def test_the_page_says_which_resume_was_wrong() -> None:
    right = Kill(1.0, 9, Left(["id"], []), "checkpoint_2", 4, 59.0, 3, resumed_epochs=4, leftovers=0)
    wrong = Kill(2.0, 9, Left([], []), "checkpoint_3", 5, 59.0, 5, resumed_epochs=4, leftovers=0)
    text = kills.page([Session(0, "2026-01-01", 10, "c0ffee", [right, wrong], 8)], 15)
    assert "2 kills, 1 of them inside an upload: 1 of 2 resumes took" in text
    assert "| 1 | 1.00 | 9 | yes | 4 | 59.0 | 3 | 4 | 0 |" in text
    assert "| 2 | 2.00 | 9 | no | 5 | 59.0 | 5 | **4** | 0 |" in text
