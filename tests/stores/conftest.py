"""What the classes of the conformance suite share."""

import pytest


@pytest.fixture(scope="module")
def buckets():
    """One on each server for all its tests."""
    return {}


@pytest.fixture(scope="module")
def clients():
    """boto3's, one for each server, since making one takes a while."""
    return {}
