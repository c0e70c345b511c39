from pathlib import Path

import pytest
from evaluated import write_photographs, write_run


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    write_photographs(tmp_path / "photographs" / "train", (16, 14, 12), 0)
    write_photographs(tmp_path / "photographs" / "val", (6, 6, 4), 1)
    return tmp_path / "photographs"


@pytest.fixture
def run(tmp_path: Path, photographs: Path) -> Path:
    return write_run(tmp_path / "run", photographs, "narrow", 16)
