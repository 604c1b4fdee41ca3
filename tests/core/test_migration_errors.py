"""Blame is in the class of the error, the figures are in its facts."""

import pickle

import pytest

from migration.errors import LocalProtocolError, ProtocolError, RemoteProtocolError


def test_the_base_class_names_nobody_and_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ProtocolError("whose fault?")


@pytest.mark.parametrize("kind", [LocalProtocolError, RemoteProtocolError])
def test_facts_are_readable_apart_and_in_the_text(kind: type[ProtocolError]) -> None:
    error = kind("page differs", pfn=12, round_index=3)
    assert error.facts == {"pfn": 12, "round_index": 3}
    assert str(error) == "page differs (pfn=12, round_index=3)"
    assert str(kind("plain")) == "plain"


@pytest.mark.parametrize("kind", [LocalProtocolError, RemoteProtocolError])
def test_errors_cross_process_boundaries_whole(kind: type[ProtocolError]) -> None:
    error = pickle.loads(pickle.dumps(kind("page differs", pfn=12)))  # noqa: S301 - our own bytes
    assert type(error) is kind
    assert str(error) == "page differs (pfn=12)"
