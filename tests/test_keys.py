"""Action strings and key rows against LingBot's own tables and the grammar."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lingbot_nb.control.keys import KEYS, LOOKS, MOVES, check_keys, format_keys, held, pad_to_clip, parse_keys

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "camera.npz")
STRINGS = sorted({name.split("/")[1] for name in FIXTURE.files if name.startswith("string/")})
ROWS = hnp.arrays(bool, st.tuples(st.integers(1, 30), st.just(8)))


@pytest.mark.parametrize("text", STRINGS)
def test_action_strings_give_the_released_tables(text):
    keys = pad_to_clip(parse_keys(text))
    np.testing.assert_array_equal(keys[:, MOVES], FIXTURE[f"string/{text}/wasd"] > 0.5)
    np.testing.assert_array_equal(keys[:, LOOKS], FIXTURE[f"string/{text}/ijkl"] > 0.5)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_format_and_parse_are_inverse(keys):
    np.testing.assert_array_equal(parse_keys(format_keys(keys)), keys)


@given(ROWS)
@settings(max_examples=30, deadline=None)
def test_padding_keeps_rows_and_adds_the_fewest_empty_ones(keys):
    padded = pad_to_clip(keys)
    assert len(padded) % 4 == 1 and 0 <= len(padded) - len(keys) < 4
    np.testing.assert_array_equal(padded[: len(keys)], keys)
    assert not padded[len(keys) :].any()


def test_grammar_ignores_case_white_space_and_kind_of_comma():
    plain = parse_keys("wl-3,none-2,i-1")
    for text in ("WL-3, None-2 ,I-1", "w l - 3，none-2，\ti-1\n", "lw-3,NONE-2,i-01"):
        np.testing.assert_array_equal(parse_keys(text), plain)
    assert format_keys(plain) == "wl-3,none-2,i-1"


def test_upstream_example_pads_from_90_to_93():
    keys = parse_keys("w-10,a-10,d-10,iw-15,none-10,j-10,l-10,s-15")
    assert (len(keys), len(pad_to_clip(keys))) == (90, 93)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("w", "'w'"),
        ("w-4,", "''"),
        ("-4", "'-4'"),
        ("w-", "'w-'"),
        ("w-0", "'0'"),
        ("w-2.5", "'2.5'"),
        ("w--4", "unknown key '-'"),
        ("wx-4", "unknown key 'x'"),
        ("nonew-4", "unknown key 'n'"),
        ("w-٣", "'٣'"),
    ],
)
def test_bad_strings_name_the_segment(text, part):
    with pytest.raises(ValueError, match="action segment") as error:
        parse_keys(text)
    assert part in str(error.value)


def test_text_is_required():
    with pytest.raises(ValueError, match="not text"):
        parse_keys(["w-4"])


def test_held_follows_column_order():
    for column, key in enumerate(KEYS):
        np.testing.assert_array_equal(held([key.upper()]), np.eye(8, dtype=bool)[column])
    np.testing.assert_array_equal(held("wl"), held({"l", "w"}))
    assert not held([]).any()
    with pytest.raises(ValueError, match="key 'q' is not one of"):
        held("wq")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (np.zeros((5, 4)), r"shape \[5, 4\]"),
        (np.zeros(8), r"shape \[8\]"),
        (np.full((2, 8), np.nan), "nan at row 0, column 0"),
        (np.eye(8) * 2, "2.0 at row 0, column 0"),
        (np.array([["w"] * 8]), "type <U1"),
    ],
)
def test_bad_tables_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        check_keys(keys)


def test_no_rows_have_no_string():
    with pytest.raises(ValueError, match="0 rows"):
        format_keys(np.zeros((0, 8), dtype=bool))
