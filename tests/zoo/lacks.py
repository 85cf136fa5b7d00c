"""What the engine cannot do yet on a derived description: each entry is a strict xfail that it will flip."""

from __future__ import annotations

ROW = ("test_a_row_of_a_batch_equals_the_request_alone",)
ALL = (
    *ROW,
    "test_open_gates_equal_dense_bit_for_bit",
    "test_detached_is_as_before",
    "test_reusing_every_block_adds_the_same_again",
    "test_reusing_every_other_block_computes_the_rest",
    "test_a_skipped_block_is_the_identity_on_its_streams",
)
RUNS = tuple(name for name in ALL if name != "test_open_gates_equal_dense_bit_for_bit")

LIST_SAMPLE = "the sample is a list of tensors, one a row"
TIME_PER_FRAME = "a time per frame or token"
ENDS_AS_NONE = "the last block ends a stream as None"
NESTED_ROWS = "rows inside tuples, lists and dicts"
ROW_AXIS = "rows on another axis than the first"
FOLDED_ROWS = "rows folded with frames"
NO_ROWS = "rows that cannot be told apart must decide together"
FLEX_ATTENTION = "FlexAttention cannot be counted on the meta device"

LACKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ZImageTransformer2DModel": (LIST_SAMPLE, ALL),
    "Cosmos3OmniTransformer": (LIST_SAMPLE, ALL),
    "WanAnimate2Transformer3DModel": (LIST_SAMPLE, ALL),
    "AnyFlowTransformer3DModel": (TIME_PER_FRAME, ALL),
    "AnyFlowFARTransformer3DModel": (FLEX_ATTENTION, ALL),
    "SD3Transformer2DModel": (
        ENDS_AS_NONE,
        tuple(name for name in RUNS if name != "test_detached_is_as_before"),
    ),
    "TransformerTemporalModel": (FOLDED_ROWS, ALL),
    "LatteTransformer3DModel": (FOLDED_ROWS, ROW),
    "ErnieImageTransformer2DModel": (ROW_AXIS, ROW),
    "Ideogram4Transformer2DModel": (NESTED_ROWS, ROW),
    "JoyImageEditPlusTransformer3DModel": (NESTED_ROWS, ROW),
    "Kandinsky6Transformer3DModel": (NESTED_ROWS, ROW),
    "LTXVideoTransformer3DModel": (NESTED_ROWS, ROW),
    "LTX2VideoTransformer3DModel": (NESTED_ROWS, ROW),
    "QwenImage21Transformer2DModel": (NO_ROWS, ROW),
}


def lacks(model: str, test: str) -> str:
    """Why a test of a model fails today, "" if it passes."""
    reason, tests = LACKS.get(model, ("", ()))
    return reason if test in tests else ""
