from dataclasses import replace

import pytest

from lingbot_nb.presets import ALL, LINGBOT, TINY, StreamSettings, VideoShape, by_name


def test_geometry_of_the_two_scales():
    assert (LINGBOT.shape.tokens_per_frame, LINGBOT.shape.frames, LINGBOT.shape.tokens) == (30 * 52, 21, 21 * 30 * 52)
    assert (TINY.shape.tokens_per_frame, TINY.shape.grid) == (60, (21, 6, 10))
    assert VideoShape(720, 1280, 81).tokens_per_frame == 3600
    assert LINGBOT.shape.with_frames(9).pixel_frames == 33


def test_camera_features_per_token():
    assert LINGBOT.model.control_features == 1536
    assert by_name("lingbot-act").model.control_features == 1792


@pytest.mark.parametrize("size", [(90, 160, 81), (96, 168, 81), (0, 160, 81)])
def test_sizes_that_do_not_fill_tokens_are_refused(size):
    with pytest.raises(ValueError, match="does not divide into 16-pixel tokens"):
        VideoShape(*size)


@pytest.mark.parametrize("count", [0, 2, 80])
def test_clip_lengths_are_4n_plus_1(count):
    with pytest.raises(ValueError, match="4n . 1"):
        VideoShape(96, 160, count)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'huge': use one of tiny, "):
        by_name("huge")
    assert [by_name(preset.name) for preset in ALL] == list(ALL)


@pytest.mark.parametrize(
    ("chunk", "image_first", "frames", "lengths"),
    [(1, True, 4, [1, 1, 1, 1]), (3, True, 9, [1, 3, 3, 2]), (3, False, 9, [3, 3, 3]), (3, False, 1, [1])],
)
def test_chunk_lengths(chunk, image_first, frames, lengths):
    settings = StreamSettings(chunk=chunk, window=9, sink=1, image_first=image_first)
    assert settings.chunk_lengths(frames) == lengths


def test_a_window_must_hold_sink_and_chunk():
    with pytest.raises(ValueError, match="window 3 cannot hold sink 1 . chunk 3"):
        replace(TINY.stream, window=3, sink=1, chunk=3)
    with pytest.raises(ValueError, match="chunk 0"):
        StreamSettings(chunk=0)
    with pytest.raises(ValueError, match="sink -1"):
        StreamSettings(sink=-1)
