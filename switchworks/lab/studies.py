"""The studies there are, by name. A training of one thread takes ten minutes per 12M tokens."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from switchworks.lab.study import Arm, Study

TEXT = ("--data.source", "package_docs")
PREFIX = (
    *("--model.no-decoder-only", "--data.objective", "prefix"),
    *("--data.input-length", "39", "--data.target-length", "39"),
)
"""An encoder-decoder: half of its positions are targets."""

EXPERTS = "32"
"""Of the studies that change something else."""

Expected = Literal["better", "worse", "the same"]


def arm(name: str, flags: str = "", expected: Expected | None = None) -> Arm:
    """`speedup` with 32 experts in every block, and `flags`."""
    words = ("--routing.experts", EXPERTS, *flags.split())
    return Arm(name=name, recipe="speedup", flags=words, expected=expected)


def experts(number: int) -> Arm:
    """`speedup` with so many experts in every block: better than its dense twin in the paper."""
    words = ("--routing.experts", str(number))
    return Arm(name=f"{number} experts", recipe="speedup", flags=words, expected="better")


FINER = (
    "--routing.experts {} --routing.expert-d-ff {} --routing.strategy {} "
    "--routing.capacity-factor {} --routing.second-threshold 0"
)
BASE = arm(f"{EXPERTS} experts")


def short(name: str, question: str, paper: str, arms: Iterable[Arm]) -> Study:
    """A study of what changes a model of 32 experts, in runs of 12M tokens."""
    arms = (BASE, *arms)
    return Study(
        name=name,
        question=question,
        paper=paper,
        arms=arms,
        seeds=(0, 1, 2),
        steps=(2500,),
        flags=(*TEXT, "--validate-every", "250"),
        minutes=10 * len(arms),
    )


STUDIES = {
    study.name: study
    for study in (
        Study(
            name="speedup",
            question="How many times fewer steps does a sparse language model need?",
            paper="Figures 1, 5 and 6: 7.5 times fewer for 64 experts against T5-Base",
            arms=(
                Arm(name="dense", recipe="speedup_dense"),
                *(experts(number) for number in (32, 128, 8, 2)),
            ),
            seeds=(0, 1, 2),
            steps=(1250, 2500, 5000, 7500, 10_000, 12_500),
            flags=(*TEXT, "--validate-every", "250"),
            minutes=5 * 70,
        ),
        Study(
            name="speedup_t5",
            question="The same of an encoder-decoder that continues the first half of its row?",
            paper="Figures 1, 5 and 6: 7.5 times fewer for 64 experts against T5-Base",
            arms=(
                Arm(name="dense encoder-decoder", recipe="speedup_dense"),
                *(
                    replace(experts(number), name=f"encoder-decoder, {number} experts")
                    for number in (32, 128)
                ),
            ),
            seeds=(0, 1, 2),
            steps=(1250, 2500, 5000, 7500, 10_000, 12_500),
            flags=(*TEXT, *PREFIX, "--validate-every", "250"),
            minutes=3 * 100,
        ),
        short(
            "capacity",
            "How much room do experts need, and is a second expert worth its price?",
            "Table 1: after 100k steps 2.0, 1.25 and 1.0 lie within 0.01 of each other, and top-2 "
            "with a capacity factor of 2.0 is ahead of Switch by 0.007",
            (
                arm("capacity factor 1.0", "--routing.capacity-factor 1.0", "the same"),
                arm("capacity factor 2.0", "--routing.capacity-factor 2.0", "the same"),
                arm("dropless", "--routing.capacity-factor none"),
                arm("top-2, 1.0", "--routing.strategy top2 --routing.capacity-factor 1.0"),
                arm("top-2, 1.25", "--routing.strategy top2", "the same"),
                arm(
                    "top-2, 2.0",
                    "--routing.strategy top2 --routing.capacity-factor 2.0",
                    "the same",
                ),
            ),
        ),
        short(
            "balance",
            "How strongly must experts be kept evenly used?",
            "Section 2.2: of 1e-1 to 1e-5 it takes 1e-2, which balances quickly and leaves the "
            "loss alone",
            (
                *(
                    arm(f"balance weight {weight}", f"--routing.balance-weight {weight}")
                    for weight in ("1e-1", "1e-3", "1e-4", "1e-5")
                ),
                arm("balanced by a bias", "--routing.balance-weight 0 --routing.bias-rate 1e-3"),
            ),
        ),
        short(
            "exploration",
            "Should routers explore?",
            "Table 11: jitter -1.468, argmax -1.471, input dropout -1.480, sampling -1.570",
            (
                arm("argmax", "--routing.exploration argmax", "the same"),
                arm("input dropout", "--routing.exploration input_dropout", "the same"),
                arm("sampling", "--routing.exploration sample", "worse"),
            ),
        ),
        short(
            "finer",
            "Are many narrow experts better than few wide ones at the same cost?",
            "No table: the paper's experts have the width of the dense FFN",
            (
                arm("64 of half the width, top-2", FINER.format(64, 128, "top2", 2.5)),
                arm("128 of a quarter, top-4", FINER.format(128, 64, "top4", 5.0)),
            ),
        ),
        short(
            "routers",
            "What helps routers to learn early in a short run?",
            "No table: the paper has one setting of these",
            (
                *(
                    arm(f"router rate x {factor}", f"--optim.router-lr {factor}")
                    for factor in ("0.25", "4")
                ),
                arm("z-loss 1e-3", "--routing.z-weight 1e-3"),
            ),
        ),
    )
}
"""Every study by its name; `switchworks lab` lists them."""
