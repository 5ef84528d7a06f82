"""A server that several modules ask: it is started once."""

import pytest
from servers import AvarServer

from verl_avar.miniature import base_path


@pytest.fixture(scope="session")
def miniature_server(tmp_path_factory):
    """`avar serve` of the shipped miniature. A test that ends it starts it again."""
    flags = ["--kv-cache-memory-bytes", "64M", "--limit-mm-per-prompt", '{"image": 3, "video": 0}']
    with AvarServer(base_path(), tmp_path_factory.mktemp("miniature_server"), *flags) as started:
        yield started.wait()
        assert started.stop() == 0
        assert not started.left_files()


def pytest_collection_modifyitems(items):
    # One after another, at the end, so that it does not run beside tests that measure.
    items.sort(key=lambda item: "miniature_server" in item.fixturenames)
