"""The plane's predictions against samples and by hand; the gradient where it must vanish; what each slider does."""

import matplotlib

matplotlib.use("Agg")

from dataclasses import replace

import pytest
import torch
from matplotlib import pyplot as plt

from lingbot_nb.report import dmd_toy as toy
from lingbot_nb.report.dmd_toy import Choice, Mixture


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def column(value, count=1):
    return torch.full((count, 1), value, dtype=torch.float64)


def test_one_gaussian_by_hand():
    """x0 ~ N(m, s²), x = a x0 + sigma eps: E[x0 | x] = m + a s² (x - a m) / (a² s² + sigma²)."""
    mixture = Mixture(torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.5)
    x = torch.tensor([[0.3, 0.8]], dtype=torch.float64)
    expected = mixture.means + 0.6 * 0.25 / (0.36 * 0.25 + 0.16) * (x - 0.6 * mixture.means)
    torch.testing.assert_close(mixture.clean(x, column(0.4)), expected)


def test_a_mixtures_prediction_is_the_mean_of_what_led_there():
    count, sigma = 400_000, 0.6
    generator = rng()
    clean = toy.REAL.sample(count, generator)
    noisy = (1 - sigma) * clean + sigma * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    for place in ([0.4, 0.2], [-0.5, -0.3]):
        place = torch.tensor([place], dtype=torch.float64)
        here = (noisy - place).norm(dim=1) < 0.1
        found = toy.REAL.clean(place, column(sigma))
        torch.testing.assert_close(clean[here].mean(0, keepdim=True), found, atol=0.08, rtol=0)


@pytest.mark.parametrize("normalise", [True, False])
def test_no_gradient_where_the_critic_sees_what_the_prompt_asks_for(normalise):
    x = toy.START.sample(50, rng())
    choice = Choice(normalise=normalise)
    torch.testing.assert_close(toy.gradient(x, toy.PROMPTED, choice, rng(1)), torch.zeros_like(x))
    assert toy.gradient(x, toy.PROMPTED, replace(choice, guidance=2.0), rng(1)).abs().sum() > 0


def test_guidance_is_u_plus_w_times_c_minus_u():
    """w = 0 is the unprompted teacher, w = 1 the prompted one, and the way between them is straight."""
    x = toy.START.sample(50, rng())
    at = [toy.gradient(x, toy.REAL, Choice(guidance=w, normalise=False), rng(1)) for w in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(at[0], torch.zeros_like(x))
    torch.testing.assert_close(at[2], 3 * at[1])


def test_the_normaliser_is_the_distance_to_the_real_prediction():
    x = toy.START.sample(50, rng())
    critic = Mixture(x, toy.BLUR)
    raw, scaled = (toy.gradient(x, critic, Choice(normalise=n, low=0.5, high=0.5), rng(1)) for n in (False, True))
    generator = rng(1)
    torch.rand(50, 1, generator=generator, dtype=x.dtype)
    noisy = 0.5 * x + 0.5 * torch.randn(50, 2, generator=generator, dtype=x.dtype)
    distance = (x - toy.PROMPTED.clean(noisy, column(0.5, 50))).abs().mean(1, keepdim=True)
    torch.testing.assert_close(scaled * distance, raw)


def last(choice, seed=0):
    *_, end = toy.walk(choice, seed)
    return toy.outcome(end.points)


def test_the_cloud_reaches_both_modes_and_keeps_their_spread():
    found = last(Choice())
    assert min(found.shares) > 0.25 and sum(found.shares) > 0.9
    assert 0.8 < found.spread < 1.15 and abs(found.beyond) < 0.3


def test_each_slider_does_what_the_page_says():
    good = last(toy.EXAMPLES["as it should be"])
    assert last(toy.EXAMPLES["guidance 3"]).beyond > good.beyond + 0.8
    # Mass does not travel between modes that only large noise joins.
    assert last(toy.EXAMPLES["only low noise, to 0.3"]).shares[0] > good.shares[0] + 0.2
    # Where all is noise only the mean is matched.
    assert sum(last(toy.EXAMPLES["only high noise, from 0.8"]).shares) < 0.7


def test_a_walk_is_its_seed_and_begins_before_the_first_step():
    one, two = (list(toy.walk(Choice(steps=3), seed=4)) for _ in range(2))
    assert len(one) == 4 and one[0].gradient == 0 and one[1].gradient > 0
    assert all(torch.equal(a.points, b.points) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].points, next(toy.walk(Choice(steps=0), seed=5)).points)


def test_the_field_points_away_from_the_cloud_towards_the_data():
    places, moves = toy.field(Mixture(toy.START.means, 0.3), Choice(), side=7)
    assert places.shape == moves.shape == (49, 2)
    start = (places - toy.START.means).norm(dim=1).argmin()
    assert moves[start, 1] > 0


def test_outcome_by_hand():
    points = torch.cat([toy.PROMPTED.means, torch.tensor([[0.0, -9.0]], dtype=torch.float64)])
    found = toy.outcome(points)
    assert found.shares == pytest.approx((1 / 3, 1 / 3)) and found.spread == 0
    assert found.beyond == pytest.approx(-10 / 3 / toy.PROMPTED.std)
    assert toy.outcome(points[2:]).shares == (0, 0)


def test_the_picture_and_the_table_name_their_parts():
    choice = Choice(steps=2)
    figure = toy.draw(choice)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "descent at the start, and ways taken",
        "student at the end",
        "size of the gradient",
    ]
    assert len(figure.axes[2].lines[0].get_xdata()) == 2
    table = toy.compare({"short": choice}).splitlines()
    assert len(table) == 3 and table[2].startswith("| short |") and table[2].endswith("dev. |")


def test_sliders_redraw_and_say_what_contradicts(capsys, monkeypatch):
    pytest.importorskip("ipywidgets")
    shown = []
    monkeypatch.setattr(toy, "show", lambda choice, seed: shown.append(choice))
    widget = toy.explorer(Choice(steps=1))
    sliders = {child.description: child for child in widget.children[0].children}
    sliders["guidance w"].value = 4.0
    assert shown[-1] == Choice(steps=1, guidance=4.0)
    sliders["sigma from"].value = 0.9
    sliders["sigma to"].value = 0.5
    assert "use 0 < low <= high < 1" in capsys.readouterr().out


@pytest.mark.parametrize(("bad", "message"), [(dict(low=0.0), "use 0 < low"), (dict(ratio=0), "ratio 0 is below 1")])
def test_bad_choices_are_one_sentence(bad, message):
    with pytest.raises(ValueError, match=message):
        Choice(**bad)
