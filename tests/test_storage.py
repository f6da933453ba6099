"""A folder that every node must share is known by a mark, and nothing of it stays."""

from pathlib import Path

import pytest

from meanet.errors import UserError
from meanet.storage import check_marked, check_writable, marked


def test_another_folder_under_the_same_path_is_found_out(tmp_path: Path) -> None:
    folder, other = check_writable(str(tmp_path / "runs")), tmp_path / "of another machine"
    with marked(folder) as marker:
        check_marked(folder, marker)
        with pytest.raises(UserError, match=r"is another folder there: with --storage give one that all nodes share"):
            check_marked(str(other), marker)
    assert not other.exists(), "a node that does not share it gets no folder"
    assert list(Path(folder).iterdir()) == []
