"""One training step of one rank, traced without numbers: `explain --simulate`.

The model is built on the meta device and spread over ranks that are not there by the code that
training uses, and the step is training's own. So what is counted is what a run does.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from switchworks.fast import attention, norm
from switchworks.optim import adafactor
from switchworks.parallel import Ranks, check_fit
from switchworks.plan.fake import fake_ranks, no_numbers
from switchworks.plan.footprint import Footprint, batch_like, measure_step
from switchworks.plan.trace import Traffic, Work
from switchworks.training import Experiment, spread_model, state_of


def simulate(experiment: Experiment) -> Footprint:
    """What a step of `experiment` takes of one rank of its mesh.

    More than three micro-batches are alike: two and three are traced and the others added. A run
    without a capacity is traced as if its load were even. Raises ConfigError if the model does not
    fit the mesh.
    """
    check_fit(experiment.model, experiment.mesh)
    experiment = _with_even_load(experiment)
    with fake_ranks(experiment.mesh) as ranks:
        return simulate_on(ranks, experiment)


def simulate_on(ranks: Ranks, experiment: Experiment) -> Footprint:
    """`simulate` on fake `ranks` that are there already."""
    parts = experiment.micro_batches
    if parts <= 3:
        return _trace(ranks, experiment)
    two, three = (_trace(ranks, _with_parts(experiment, count)) for count in (2, 3))
    return along(two, three, parts - 2)


def _trace(ranks: Ranks, experiment: Experiment) -> Footprint:
    # On the meta device, where to cut a tensor into thousands of parts takes no time.
    spread = spread_model(experiment, None, ranks, empty=True)
    with no_numbers(), _large_blocks():
        state = state_of(experiment, spread, ranks, empty=True)
        return measure_step(state, batch_like(experiment))


@contextmanager
def _large_blocks() -> Iterator[None]:
    """Optimizer and norms go through a tensor in one piece, and attention through sixteen million
    scores at a time: an accelerator has no cache to fit, and every piece takes time to trace."""
    plain = adafactor._BLOCK, norm._BLOCK, attention.BLOCK
    adafactor._BLOCK, norm._BLOCK, attention.BLOCK = 2**62, 2**62, 2**24
    try:
        yield
    finally:
        adafactor._BLOCK, norm._BLOCK, attention.BLOCK = plain


def _with_parts(experiment: Experiment, count: int) -> Experiment:
    rows = experiment.batch_size // experiment.micro_batches * count
    return replace(experiment, micro_batches=count, batch_size=rows)


def _with_even_load(experiment: Experiment) -> Experiment:
    routing = experiment.model.routing
    if routing is None or routing.capacity_factor is not None or routing.expert_capacity:
        return experiment
    even = replace(routing, capacity_factor=1.0, min_capacity=1)
    return replace(experiment, model=replace(experiment.model, routing=even))


def along(first: Footprint, second: Footprint, steps: float) -> Footprint:
    """`steps` from `first` in the direction of `second`, which is one step away: every count is
    taken to grow evenly."""

    def at(one: float, other: float) -> int:
        return round(one + steps * (other - one))

    work = Counter[Work]()
    for kind in first.work.keys() | second.work.keys():
        work[kind] = at(first.work[kind], second.work[kind])
    ours = {item[:4]: item for item in first.traffic}
    theirs = {item[:4]: item for item in second.traffic}
    nothing = (0, 0)
    traffic = []
    for key in sorted(ours.keys() | theirs.keys()):
        one = ours[key][4:] if key in ours else nothing
        other = theirs[key][4:] if key in theirs else nothing
        traffic.append(Traffic(*key, *map(at, one, other)))
    sizes = ("weights", "masters", "gradients", "optimizer")
    return Footprint(
        **{name: at(getattr(first, name), getattr(second, name)) for name in sizes},
        others=tuple(map(at, first.others, second.others)),
        passing=tuple(map(at, first.passing, second.passing)),
        work=work,
        traffic=tuple(traffic),
    )
