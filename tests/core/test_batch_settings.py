"""Settings that make a vector depend on the other texts of its batch."""

import pytest

from embedonce import SpaceError, VectorSpace
from embedonce.batch_settings import refuse_batch_settings


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"late_chunking": True}, "late_chunking"),
        ({"lateChunking": "true"}, "lateChunking"),
        ({"body": {"use_late-chunking": 1}}, "body.use_late-chunking"),
        ({"calls": [{"late_chunking": True}]}, "calls[0].late_chunking"),
        ({"precision": "int8"}, "precision"),
        ({"precision": "INT8", "other_ranges": [1.0]}, "precision"),
        ({"embedding_precision": "uint8"}, "embedding_precision"),
        ({"chunking": "late"}, "chunking"),
        ({"chunking_strategy": "Late"}, "chunking_strategy"),
        ({"late_pooling": True}, "late_pooling"),
        ({"mode": "late_chunking"}, "mode"),
        ({"features": ["late_chunking"]}, "features[0]"),
        ({"options": [["late_chunking", True]]}, "options[0].late_chunking"),
        ({"options": '{"late_chunking": true}'}, "options"),
        ({"encode_kwargs": {"precision": "uint8", "quantization_ranges": None}}, "encode_kwargs.precision"),
    ],
)
def test_a_setting_that_ties_a_text_to_its_batch_is_refused(settings, name):
    with pytest.raises(SpaceError, match="depends on the other texts") as caught:
        VectorSpace(provider="p", model="m", extra=settings)
    assert f"with {name}" in str(caught.value)
    with pytest.raises(SpaceError, match=r"with extra_body\."):
        refuse_batch_settings(settings, "extra_body")


@pytest.mark.parametrize(
    "settings",
    [
        {"late_chunking": False},
        {"late_chunking": None},
        {"late_chunking": "false"},
        {"precision": "float32"},
        {"precision": "binary"},
        {"precision": "int8", "quantization_ranges": [[-1.0], [1.0]]},
        {"precision": "int8", "ranges": [[-1.0], [1.0]]},
        {"options": '{"late_chunking": false}'},
        {"chunking": "fixed", "prompt": "Explain late_chunking to a child: "},
        {"options": [["late_chunking", False]]},
    ],
)
def test_a_setting_that_does_not_is_accepted(settings):
    assert VectorSpace(provider="p", model="m", extra=settings).extra == settings
    refuse_batch_settings(settings)


def test_a_declared_space_is_checked_too():
    with pytest.raises(SpaceError, match="late_chunking"):
        VectorSpace.of({"model": "m", "late_chunking": True})
