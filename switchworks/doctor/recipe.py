"""A recipe: settings that are allowed, and that a run will suffer from."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from switchworks.data import raw_length
from switchworks.doctor.finding import Finding, judge
from switchworks.doctor.machine import free_bytes
from switchworks.doctor.text import about_tokens
from switchworks.model import RoutingConfig, active_parameters
from switchworks.optim import learning_rate
from switchworks.plan import count, memory_per_rank
from switchworks.recipes import RECIPES
from switchworks.training import Experiment, MeshConfig, machine

LEAST_SLOTS = 4
"""Mesh-TensorFlow's least capacity: where its formula gives fewer slots, each expert gets 4, and
the capacity factor is no longer the one that was set."""
LEAST_TOKENS = 8
"""Per expert and step. Were tokens drawn evenly, an expert would get none in one of 3,000 steps
(exp(-8)); routing is never as even, and a gradient of so few tokens is mostly noise."""
RATE_FACTOR = 10
"""Recipes of one optimizer differ by less than this between neighbouring sizes (0.1 at 0.6M
parameters per token, 0.035 at 3M, 0.01 at 220M and beyond), and sweeps go by factors of 2 to 3."""
USUAL_RATES = (1e-5, 1e-2)
"""adamw and muon, in whose units no recipe has a rate: GPT-3 took 6e-5 (175B) to 6e-4 (125M); far
from those, a factor of six to fifteen beyond, a rate is rarely of use."""
MANY_EPOCHS, TOO_MANY_EPOCHS = 4, 16
"""Muennighoff et al. 2023 (arXiv 2305.16264): text read up to 4 times is worth nearly as much as
new text; from about 16 times on more of it adds next to nothing."""
MAX_BALANCE = 0.1
"""The largest weight that the paper tried; it took 1e-2, and says that it should not overwhelm the
language model's loss."""
LEAST_USES = 100
"""Of an id in the text, on average. By Zipf's law most ids then have a few dozen."""


def check_recipe(experiment: Experiment, folder: Path, *, tuned: bool = False) -> Iterator[Finding]:
    """Findings on the settings of `experiment`, to be run in `folder`. `tuned`: it starts from a
    trained model. Of the text it only looks at the size of the files."""
    experiment = experiment.resolved(machine.fastest_precision())
    routing = experiment.model.routing
    if routing is not None:
        for stack, tokens in experiment.group_tokens.items():
            yield _capacity(routing, stack, tokens)
        yield _tokens_per_expert(experiment, routing)
        yield _balance(routing)
    yield _rate(experiment, tuned)
    yield _warmup(experiment)
    if tokens := about_tokens(experiment.data):
        yield _epochs(experiment, tokens)
        yield _vocabulary(experiment, tokens)
    yield _memory(experiment)
    yield _disk(experiment, folder)


def _capacity(routing: RoutingConfig, stack: str, tokens: int) -> Finding:
    """Drawn evenly, an expert is asked for n tokens of a group, with a standard deviation of
    sqrt(n): with fewer spare slots than that, chance alone fills a sixth of the queues."""
    slots, factor = routing.capacity(tokens, training=True), routing.capacity_factor
    if slots is None:
        return Finding("ok", f"capacity: no limit of slots in the {stack}")
    n = tokens * routing.experts_per_token / routing.experts
    subject = (
        f"capacity: {slots} slots for each {stack} expert, asked for {n:.1f} tokens on average"
    )
    if routing.expert_capacity is None and factor is not None:
        exact = tokens * factor / routing.experts
        rows = math.ceil(routing.group_sequences * LEAST_SLOTS / exact)
        if exact < LEAST_SLOTS:
            return judge(subject, "warning", "few-slots", factor=factor, exact=exact, rows=rows)
    if slots < n:
        return judge(subject, "warning", "always-drops")
    enough = routing.rule.experts_choose or slots >= n + math.sqrt(n)
    return judge(subject, "note", "little-slack", unless=enough)


def _tokens_per_expert(experiment: Experiment, routing: RoutingConfig) -> Finding:
    groups = experiment.batch_size / routing.group_sequences
    tokens = min(experiment.group_tokens.values()) * groups * routing.experts_per_token
    share = tokens / routing.experts
    subject = f"tokens per expert: {share:.1f} in each step, in the stack with fewest"
    rows = math.ceil(experiment.batch_size * LEAST_TOKENS / share)
    return judge(subject, "warning", "few-tokens", unless=share >= LEAST_TOKENS, rows=rows)


def _balance(routing: RoutingConfig) -> Finding:
    weight, rate = routing.balance_weight, routing.bias_rate
    subject = f"balance: weight {weight:g}, bias rate {rate:g}"
    if not (weight or rate or routing.rule.experts_choose):
        return judge(subject, "warning", "no-balance")
    return judge(subject, "warning", "much-balance", unless=weight <= MAX_BALANCE)


def _usual_rates(experiment: Experiment) -> tuple[float, float, str]:
    """The lowest and highest rate that are usual for the optimizer and the size, and whose they
    are."""
    optim = experiment.optim
    if optim.name in ("adamw", "muon"):
        return (*USUAL_RATES, "{:g} to {:g} is usual".format(*USUAL_RATES))
    if optim.name != "adafactor" or not optim.parameter_scale:
        return 0.0, math.inf, "no usual one is known here"
    size = math.log(active_parameters(experiment.model))
    recipes = [make() for name, make in RECIPES.items() if name != "finetune"]
    near = min(recipes, key=lambda each: abs(math.log(active_parameters(each.model)) - size))
    rate = _peak(near)
    return rate / RATE_FACTOR, rate * RATE_FACTOR, f"{rate:g} in {near.name}, the nearest in size"


def _peak(experiment: Experiment) -> float:
    warmup = max(0, experiment.optim.warmup_steps - 1)
    return learning_rate(experiment.optim, warmup, warmup + 2)


def _rate(experiment: Experiment, tuned: bool) -> Finding:
    rate, (low, high, label) = _peak(experiment), _usual_rates(experiment)
    subject = f"rate: {rate:.3g} at its highest, {experiment.optim.name}; {label}"
    if rate > high:
        return judge(subject, "warning", "high-rate", high=high)
    return judge(subject, "note", "low-rate", unless=tuned or rate >= low, low=low)


def _warmup(experiment: Experiment) -> Finding:
    steps, optim = experiment.num_steps, experiment.optim
    subject = f"warm-up: {optim.warmup_steps:,} of {steps:,} steps, schedule {optim.schedule}"
    falls = optim.schedule == "rsqrt" or steps == 1 or optim.warmup_steps < steps
    return judge(subject, "warning", "all-warmup", unless=falls, steps=max(1, steps // 10))


def _epochs(experiment: Experiment, tokens: float) -> Finding:
    data = experiment.data
    row = data.input_length + data.target_length
    if data.objective == "span_corruption":
        row = raw_length(data.input_length, data.noise_density, data.mean_span)
    epochs = experiment.num_steps * experiment.batch_size * row / tokens
    return repeated(f"epochs: about {epochs:.1f} of about {count(tokens)} tokens", epochs)


def repeated(subject: str, epochs: float) -> Finding:
    """The finding on a text that is read `epochs` times."""
    level = "warning" if epochs > TOO_MANY_EPOCHS else "note"
    return judge(subject, level, "many-epochs", unless=epochs <= MANY_EPOCHS)


def _vocabulary(experiment: Experiment, tokens: float) -> Finding:
    size = experiment.model.vocab_size
    uses = tokens / size
    subject = f"vocabulary: {size:,} ids, each about {uses:,.0f} times in the text"
    smaller = max(512, int(tokens / LEAST_USES))
    return judge(subject, "note", "rare-ids", unless=uses >= LEAST_USES, size=smaller)


def _memory(experiment: Experiment) -> Finding:
    needs, free = memory_per_rank(experiment)["total"], machine.available_memory()
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    subject = f"memory: {needs / 2**30:.2f} GiB for weights, gradients and optimizer of one rank"
    gib = (free or 0) / 2**30
    return judge(subject, "problem", "no-memory", unless=free is None or needs <= free, free=gib)


def _disk(experiment: Experiment, folder: Path) -> Finding:
    """Checkpoints hold float32 weights and the optimizer's moments; one more than are kept exists
    while the newest is written. The model is no larger than a checkpoint."""
    sizes, free = memory_per_rank(replace(experiment, mesh=MeshConfig())), free_bytes(folder)
    state = (sizes["masters"] or sizes["weights"]) + sizes["optimizer"]
    needs = state * (experiment.keep_checkpoints + 2)
    subject = f"disk: {needs / 2**30:.2f} GiB for checkpoints and model"
    return judge(subject, "problem", "no-disk", unless=needs <= free, free=free / 2**30)
