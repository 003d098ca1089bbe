"""Distribution matching in the plane, where every score is known: what guidance, noise levels, normaliser and ratio do.

The real clips are points of a mixture of Gaussians, four modes in two prompts; the student is a cloud of points that
may move freely; the critic is the cloud as it last saw it. What a network would have to learn, E[x0 | x_sigma], has a
closed form for all three, so that whatever happens here is the method's doing and no network's:

    x_sigma = (1 - sigma)·x0 + sigma·eps,   real = u + w·(c - u),   g = (fake - real) / |x - real|,   x <- x - rate·g

(Yin et al. 2024, DMD, eq. 7, with the arithmetic of `distill.dmd`). Used by the notebook on DMD.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lingbot_nb.distill import dmd
from lingbot_nb.report import figures
from lingbot_nb.report.architecture import markdown_table

POINTS = 120
"""Points of the student's cloud; each is a clip of two numbers. More would wake a second thread at every step."""
LEARNS = 0.04
"""Share of the cloud that one update of the critic takes in."""
BLUR = 0.15
"""Standard deviation with which the critic sees each point it knows."""

LIMIT = 4.0
"""Half the side of the pictures."""


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one standard deviation, equally likely: `means` K 2."""

    means: Tensor
    std: float

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points, count 2."""
        modes = torch.randint(len(self.means), (count,), generator=generator)
        return self.means[modes] + self.std * _normal(count, generator)

    def clean(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_sigma], N 2, for points N 2 at levels N 1: the x0 prediction of a perfect network.

        With a = 1 - sigma a mode at m gives m + a s² / (a² s² + sigma²) · (x - a m); the modes count by how likely each
        is to have led to x.
        """
        a = 1 - sigma
        variance = (a * self.std) ** 2 + sigma**2
        away = x_sigma[:, None] - a[:, None] * self.means  # N K 2
        share = (-away.square().sum(-1) / (2 * variance)).softmax(1)
        posterior = self.means + (a * self.std**2 / variance)[:, None] * away
        return (share[..., None] * posterior).sum(1)


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def _modes(*places: tuple[float, float]) -> Tensor:
    return torch.tensor(places, dtype=torch.float64)


PROMPTED = Mixture(_modes((-2.0, 1.0), (2.0, 1.0)), 0.35)
"""What the prompt asks for: p(x0 | prompt)."""
REAL = Mixture(_modes((-2.0, 1.0), (2.0, 1.0), (-2.0, -1.5), (2.0, -1.5)), 0.35)
"""All of the data: what a teacher without a prompt knows."""
START = Mixture(_modes((-1.2, -0.3)), 0.7)
"""Where the student begins."""


@dataclass(frozen=True)
class Choice:
    """What the sliders say. `guidance` is w of u + w·(c - u), 1 for none; sigma is uniform in [low, high]; `ratio`
    counts critic updates to one of the student.

    Raises ValueError for a range that is empty or leaves (0, 1).
    """

    guidance: float = 1.0
    low: float = dmd.SIGMA_RANGE[0]
    high: float = dmd.SIGMA_RANGE[1]
    normalise: bool = True
    ratio: int = 5
    steps: int = 100
    rate: float = 0.1

    def __post_init__(self):
        if not 0 < self.low <= self.high < 1:
            raise ValueError(f"noise levels from {self.low} to {self.high}: use 0 < low <= high < 1")
        if self.ratio < 1:
            raise ValueError(f"ratio {self.ratio} is below 1: the critic learns at least once a step")


@dataclass(frozen=True)
class Moment:
    """The student's points N 2 after a step, what the critic knows of them, and the mean |g| of that step."""

    points: Tensor
    critic: Mixture
    gradient: float


def gradient(x: Tensor, critic: Mixture, choice: Choice, generator: torch.Generator) -> Tensor:
    """g of points N 2, each noised once to a level of its own."""
    sigma = choice.low + (choice.high - choice.low) * torch.rand(len(x), 1, generator=generator, dtype=x.dtype)
    noisy = (1 - sigma) * x + sigma * _normal(len(x), generator)
    conditional, plain = PROMPTED.clean(noisy, sigma), REAL.clean(noisy, sigma)
    real = plain + choice.guidance * (conditional - plain)
    fake = critic.clean(noisy, sigma)
    return dmd.dmd_gradient(x, real, fake) if choice.normalise else fake - real


def walk(choice: Choice, seed: int = 0) -> Iterator[Moment]:
    """The student's cloud, step by step: the critic takes in some of it `ratio` times, then every point moves."""
    generator = torch.Generator().manual_seed(seed)
    points = START.sample(POINTS, generator)
    seen = points.clone()
    yield Moment(points, Mixture(seen, BLUR), 0.0)
    for _ in range(choice.steps):
        for _ in range(choice.ratio):
            fresh = torch.rand(POINTS, generator=generator) < LEARNS
            seen = torch.where(fresh[:, None], points, seen)
        critic = Mixture(seen, BLUR)
        g = gradient(points, critic, choice, generator)
        points = points - choice.rate * g
        yield Moment(points, critic, float(g.abs().mean()))


def field(critic: Mixture, choice: Choice, *, side: int = 15, draws: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Where a point would move on average: places of a grid, side² 2, and -E[g] there, side² 2."""
    axis = torch.linspace(-LIMIT, LIMIT, side + 2, dtype=torch.float64)[1:-1]
    places = torch.cartesian_prod(axis, axis)
    generator = torch.Generator().manual_seed(seed)
    moves = -gradient(places.repeat_interleave(draws, 0), critic, choice, generator)
    return places, moves.unflatten(0, (-1, draws)).mean(1)


# ---- what came of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A cloud beside the prompted data: `shares` of its points that lie nearest to each prompted mode and within three
    deviations of it; `spread`, its deviation around those modes over the data's (below 1: diversity is lost); `beyond`,
    how far its mean lies above the data's, away from the other prompt, in deviations."""

    shares: tuple[float, ...]
    spread: float
    beyond: float


def outcome(points: Tensor) -> Outcome:
    distances = torch.cdist(points, PROMPTED.means)
    nearest = distances.argmin(1)
    near = distances.amin(1) < 3 * PROMPTED.std
    shares = tuple(float((near & (nearest == mode)).double().mean()) for mode in range(len(PROMPTED.means)))
    inside, modes = points[near], nearest[near]
    centres = torch.stack([_mean(inside[modes == mode]) for mode in range(len(PROMPTED.means))])
    spread = float((inside - centres[modes]).square().mean().sqrt()) / PROMPTED.std if len(inside) else 0.0
    beyond = float(points[:, 1].mean() - PROMPTED.means[:, 1].mean()) / PROMPTED.std
    return Outcome(shares, spread, beyond)


def _mean(points: Tensor) -> Tensor:
    return points.mean(0) if len(points) else points.new_zeros(2)


def compare(choices: dict[str, Choice], seed: int = 0) -> str:
    """Markdown table: what each choice leads to."""
    ends = {name: [*walk(choice, seed)][-1].points for name, choice in choices.items()}
    rows = [(name, *_told(outcome(points))) for name, points in ends.items()]
    return markdown_table(("choice", "left mode", "right mode", "elsewhere", "spread / data", "beyond the data"), rows)


def _told(found: Outcome) -> tuple[str, ...]:
    shares = (*found.shares, 1 - sum(found.shares))
    return (*(f"{share:.0%}" for share in shares), f"{found.spread:.2f}", f"{found.beyond:+.1f} dev.")


EXAMPLES = {
    "as it should be": Choice(),
    "guidance 3": Choice(guidance=3.0),
    "only low noise, to 0.3": Choice(high=0.3),
    "only high noise, from 0.8": Choice(low=0.8),
    "no normaliser": Choice(normalise=False),
    "critic too slow, ratio 1": Choice(ratio=1),
}
"""One slider moved at a time."""


# ---- pictures -------------------------------------------------------------------------------------------------------


@figures.styled
def draw(choice: Choice, seed: int = 0) -> Figure:
    """The field at the start and the way of the points through it; the points at the end; |g| over the steps."""
    moments = list(walk(choice, seed))
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(10, 3.6))
    _draw_field(first, moments[0].critic, choice)
    _draw_paths(first, [moment.points for moment in moments])
    first.set_title("descent at the start, and ways taken")
    _draw_field(second, moments[-1].critic, choice)
    second.scatter(*moments[-1].points.T, s=4, color=figures.STUDENT, label="student")
    second.set_title("student at the end")
    third.plot(range(1, len(moments)), [moment.gradient for moment in moments[1:]], color=figures.STUDENT)
    third.set(xlabel="step", ylabel="mean |g|", title="size of the gradient", ylim=(0, None))
    return figure


def _draw_field(ax: Axes, critic: Mixture, choice: Choice) -> None:
    places, moves = field(critic, choice)
    # Arrows of one length, darker where the field is stronger: near its zeros lengths could not be seen.
    sizes = moves.norm(dim=1)
    arrows, most = moves / sizes[:, None].clamp(min=1e-9), float(sizes.quantile(0.9))
    shades = dict(cmap="Greys", clim=(-most / 2, most))
    ax.quiver(*places.T, *arrows.T, sizes, angles="xy", scale=24, width=0.004, **shades)
    for mixture, colour in ((REAL, figures.TEACHER), (PROMPTED, figures.CLEAN)):
        for mean in mixture.means.tolist():
            ax.add_patch(plt.Circle(mean, 2 * mixture.std, fill=False, color=colour, lw=1.4))
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=(), yticks=())


def _draw_paths(ax: Axes, clouds: Sequence[Tensor], shown: int = 40) -> None:
    for path in torch.stack([cloud[:shown] for cloud in clouds], 1):
        ax.plot(*path.T, color=figures.STUDENT, lw=0.5, alpha=0.6)
    ax.scatter(*clouds[0].T, s=3, color=figures.NOISY)


def show(choice: Choice, seed: int = 0) -> None:
    """Display the picture, then the numbers."""
    from IPython.display import Markdown, display

    figure = draw(choice, seed)
    display(figure, Markdown(compare({"this choice": choice}, seed)))
    plt.close(figure)


def explorer(choice: Choice = EXAMPLES["as it should be"], seed: int = 0):
    """Sliders over `draw` and `compare`, starting from `choice`; needs ipywidgets and a front end.

    Returns the widget: display it. A contradiction between sliders is said in a sentence in place of the picture.
    """
    import ipywidgets as widgets

    def slider(name: str, value: float, low: float, high: float, step: float) -> widgets.FloatSlider:
        return widgets.FloatSlider(value, min=low, max=high, step=step, description=name, continuous_update=False)

    controls = {
        "guidance": slider("guidance w", choice.guidance, 0.0, 6.0, 0.5),
        "low": slider("sigma from", choice.low, 0.02, 0.96, 0.02),
        "high": slider("sigma to", choice.high, 0.04, 0.98, 0.02),
        "rate": slider("rate", choice.rate, 0.02, 0.5, 0.02),
        "ratio": widgets.IntSlider(choice.ratio, 1, 10, description="ratio", continuous_update=False),
        "normalise": widgets.Checkbox(choice.normalise, description="normaliser"),
    }

    def redraw(**values) -> None:
        try:
            show(replace(choice, **values), seed)
        except ValueError as contradiction:
            print(contradiction)

    panel = widgets.GridBox(list(controls.values()), layout=widgets.Layout(grid_template_columns="repeat(3, 320px)"))
    return widgets.VBox([panel, widgets.interactive_output(redraw, controls)])
