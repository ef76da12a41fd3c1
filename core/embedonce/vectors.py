"""Entries and frames. An entry is a vector with its dates and metadata. A frame is an entry as bytes.

``docs/frames.md`` has the layout of a frame, byte by byte.
"""

from ._format.costs import (
    MAX_SECONDS,
    MAX_TOKENS,
    NO_WORK,
    Cost,
    CostColumns,
    Work,
    apportion,
    is_valid_cost,
    sum_costs,
)
from ._format.entries import (
    Block,
    Columns,
    Dtype,
    Entries,
    Entry,
    Matrix,
    Metadata,
    Vector,
    freeze,
    freeze_rows,
    make_entries,
    matrix,
)
from ._format.frames import Decoded, decode_frame, decode_frames, encode_frames
from ._format.metadata import MAX_DEPTH, MAX_METADATA, is_valid_metadata, plain_metadata
from ._format.rounding import round_vectors
from ._format.sealing import SealedFrame, is_plain_frame, open_frame, seal_frame

__all__ = [
    "MAX_DEPTH",
    "MAX_METADATA",
    "MAX_SECONDS",
    "MAX_TOKENS",
    "NO_WORK",
    "Block",
    "Columns",
    "Cost",
    "CostColumns",
    "Decoded",
    "Dtype",
    "Entries",
    "Entry",
    "Matrix",
    "Metadata",
    "SealedFrame",
    "Vector",
    "Work",
    "apportion",
    "decode_frame",
    "decode_frames",
    "encode_frames",
    "freeze",
    "freeze_rows",
    "is_plain_frame",
    "is_valid_cost",
    "is_valid_metadata",
    "make_entries",
    "matrix",
    "open_frame",
    "plain_metadata",
    "round_vectors",
    "seal_frame",
    "sum_costs",
]
