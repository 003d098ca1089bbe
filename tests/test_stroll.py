"""Someone who walks by sight: what they do at a wall, in an empty view and in the simulator."""

import numpy as np
import pytest

from lingbot_nb.control.keys import KEYS, MOVES, held
from lingbot_nb.report import stroll, trials
from lingbot_nb.world.clips import HELD_OUT_SEED


def noise(seed: int, strength: int = 60) -> np.ndarray:
    """A chunk of one picture [1, 24, 32, 3] with fine detail, another one for every seed."""
    draw = np.random.default_rng(seed).integers(-strength, strength + 1, (1, 24, 32, 1))
    return np.repeat(128 + draw, 3, -1).astype(np.uint8)


def walking(seed: int = 0, keys: str = "w") -> stroll.Stroller:
    """A stroller on the way, who has just seen `noise(0)`."""
    walker = stroll.Stroller(np.random.default_rng(seed))
    walker.hold(keys, 1000)
    walker.keys(noise(0), 4)
    return walker


def test_who_sees_new_pictures_walks_on():
    walker = walking()
    for seed in range(1, 20):
        assert (walker.keys(noise(seed), 4) == held("w")).all()


@pytest.mark.parametrize("keys", ["w", "a", "wj"])
def test_a_picture_that_stands_still_under_a_walking_key_is_turned_away_from(keys):
    rows = walking(keys=keys).keys(noise(0), 4)
    assert not rows[:, MOVES].any() and (rows[:, KEYS.index("j")] ^ rows[:, KEYS.index("l")]).all()


def test_standing_still_is_no_reason_to_turn():
    assert not walking(keys="").keys(noise(0), 4).any()


def test_a_wall_is_turned_from_until_there_is_more_to_see():
    walker = walking()
    for seed in range(1, 4):
        walker.keys(noise(seed), 4)
    turned = walker.keys(noise(4, strength=3), 4)
    assert not turned[:, MOVES].any() and turned.any(1).all(), "little detail: a wall"
    for seed in range(5, 8):
        assert (walker.keys(noise(seed, strength=3), 4) == turned[0]).all(), "the same way for as long as it is a wall"
    assert walker.turning
    walker.keys(noise(8, strength=90), 4)
    assert not walker.turning


def test_a_turn_that_finds_nothing_ends_and_a_short_one_goes_on():
    walker = walking()
    for seed in range(1, 5):
        walker.keys(noise(seed), 4)
    rows = [walker.keys(noise(10 + n, strength=20 - n), 4) for n in range(18)]  # less and less to see
    lengths = np.flatnonzero([chunk[:, MOVES].any() or not chunk.any() for chunk in rows])
    assert 4 * lengths[0] == stroll.TURN[1]
    quick = walking()
    turned = quick.keys(noise(0), 4)
    assert (quick.keys(noise(3, strength=90), 4) == turned[0]).all(), f"{stroll.TURN[0]} pixel frames at the least"


def test_the_same_seed_and_pictures_give_the_same_keys():
    def walk(number: int) -> np.ndarray:
        walker = stroll.strollers(3, 2)[number]
        return np.concatenate([walker.keys(noise(seed), 4) for seed in range(30)])

    assert (walk(0) == walk(0)).all() and (walk(0) != walk(1)).any()


def test_in_the_simulator_the_pictures_decide_and_the_keys_lead_there_again():
    pytest.importorskip("vizdoom")
    from lingbot_nb.world.vizdoom import Simulator, SimulatorSettings, record

    with Simulator(SimulatorSettings(map="my_way_home")) as game:
        clips = [record(game, HELD_OUT_SEED + number, 5) for number in range(2)]
    seeds = [clip.seed for clip in clips]
    films, keys, poses = trials.simulated_by_sight(seeds, stroll.strollers(0, 2), 33, clips[0].map)
    again, same = trials.simulated(seeds, keys, clips[0].map)
    assert (films == again).all() and (poses == same).all() and films.shape[:2] == keys.shape[:2] == (2, 33)
    told = [walker.keys(film[:1], 1) for walker, film in zip(stroll.strollers(0, 2), films, strict=True)]
    assert (np.stack(told) == keys[:, :1]).all()
