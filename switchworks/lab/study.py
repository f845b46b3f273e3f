"""An experiment as data: which models are compared, over which seeds and lengths.

A `Study` compares `Arm`s. Every arm is trained with every seed, at the longest of the lengths, with
T5's learning rate, which falls with the root of the step, until it decays over the last fifth. The
shorter lengths decay off copies of that run at their own places, so that each is a whole run with a
whole schedule and together they cost little more than the longest. Comparing them is fair at every
length, which is not true of the middle of a cosine.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from switchworks.config import ConfigError

DECAY = 0.2
SCHEDULE = (
    *("--optim.schedule", "rsqrt", "--optim.warmup-steps", "500"),
    *("--optim.decay-share", str(DECAY)),
)
"""Not "wsd": Adafactor moves a weight in proportion to its size, so that at a constant rate weights
grow without end. The dense side's loss rose from 3.58 to 3.88 between steps 4,250 and 8,250."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison: a recipe with flags of `switchworks train`."""

    name: str
    recipe: str
    flags: tuple[str, ...] = ()
    expected: Literal["better", "worse", "the same"] | None = None
    """What the paper found: its loss beside that of the study's first arm."""
    script: tuple[str, ...] = ()
    """A file of experiments/ and its first words, run in place of `-m switchworks`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the trainings that answer it. The first arm is what others are held to."""

    name: str
    question: str
    paper: str
    """Where the paper has this, and what it found there, in a sentence."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    """Lengths, ascending."""
    flags: tuple[str, ...] = ()
    """Of all arms."""
    minutes: float
    """Of one seed of all arms on one core of a laptop, about."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"{self.name} has two arms of one name: {', '.join(names)}.\n  Rename one."
            )
        if list(self.steps) != sorted(set(self.steps)) or not self.steps:
            raise ConfigError(f"{self.name}.steps = {self.steps} must ascend.\n  Sort them.")

    def training(self, arm: Arm, seed: int, folder: Path) -> "Training":
        """The runs of `arm` with `seed`, below `folder`."""
        words = (arm.recipe, "--seed", str(seed), *SCHEDULE, *self.flags, *arm.flags)
        # Named after what is trained and not after the study: an arm of two studies runs once.
        slug = re.sub(r"\W+", "-", arm.name.lower()).strip("-")
        key = " ".join((*arm.script, *words)).encode()
        key = hashlib.blake2b(key, digest_size=4).hexdigest()
        place = folder / f"{slug}-s{seed}-{key}"
        return Training(arm, seed, words, place, self.steps)

    def trainings(self, folder: Path) -> Iterator["Training"]:
        """All of them, the first seed of every arm before the second of any."""
        for seed in self.seeds:
            for arm in self.arms:
                yield self.training(arm, seed, folder)


@dataclass(frozen=True)
class Training:
    """One arm with one seed: the longest run, and those that branch off it."""

    arm: Arm
    seed: int
    words: tuple[str, ...]
    """What follows `switchworks train`, but for the steps."""
    folder: Path
    steps: tuple[int, ...]

    def run_dir(self, steps: int) -> Path:
        """Where the run of this length is."""
        return self.folder / f"{steps}-steps"

    @property
    def trunk(self) -> Path:
        """The longest run."""
        return self.run_dir(self.steps[-1])

    def branches_at(self, steps: int) -> int:
        """The step whose checkpoint of the trunk a run of so many `steps` begins with."""
        return steps - round(DECAY * steps)

    def flags(self, steps: int) -> tuple[str, ...]:
        """`words` with what this length needs."""
        return (*self.words, "--steps", str(steps), "--run-dir", str(self.run_dir(steps)))
