"""Makes the images of small runs, and names the folder of a run."""

import pytest
import small_runs


@pytest.fixture
def root(tmp_path):
    return small_runs.write_images(tmp_path / "data")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"
