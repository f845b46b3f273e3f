"""The studies there are, by name. A training of one thread takes ten minutes per 12M tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from switchworks.lab.study import Arm, Study

TEXT = (
    *("--data.source", "package_docs", "--optim.lr", "2", "--validate-every", "250"),
    *("--precision", "float32"),
)
"""Of all arms, on every machine. The rate is 0.089 in the first 500 steps, 0.018 after 12,500."""
PREFIX = (
    *("--model.no-decoder-only", "--data.objective", "prefix"),
    *("--data.input-length", "39", "--data.target-length", "39"),
)
"""An encoder-decoder: half of its positions are targets."""

EXPERTS = "32"
"""Of the studies that change something else."""

LENGTHS = (1250, 3125, 6250, 12_500)
"""Steps of 4992 tokens: up to 62M."""

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
DENSE = Arm(name="dense", recipe="speedup_dense")
BASE = arm(f"{EXPERTS} experts")
TENTH = arm("a tenth of the variance", "--model.init-scale 0.1", "better")
LARGER = (
    *("--model.d-model", "128", "--model.d-ff", "512", "--model.d-kv", "32"),
    *("--model.num-layers", "4"),
)
REFERENCE = "--kernels reference"
"""Fast kernels would be set in place of what a variant rounds."""
NTLB = "--routing.strategy no_token_left_behind --routing.decoder-strategy switch"


def with_encoder(sparse: Arm) -> Arm:
    """The same arm under the name that it has beside `PREFIX`."""
    return replace(sparse, name=f"encoder-decoder, {sparse.name}")


def variant(
    name: str, model: str, sparse: Arm, flags: str = "", expected: Expected | None = None
) -> Arm:
    """`sparse` with another model: one of experiments/variants.py."""
    words = (*sparse.flags, *flags.split())
    script = "experiments/variants.py", model
    return replace(sparse, name=name, flags=words, script=script, expected=expected)


def at_other_rates(arms: Iterable[Arm]) -> Iterator[Arm]:
    for each in arms:
        for rate in ("1", "4"):
            flags = (*each.flags, "--optim.lr", rate)
            yield replace(each, name=f"{each.name} at {rate}", flags=flags, expected=None)


def short(
    name: str,
    question: str,
    paper: str,
    arms: Iterable[Arm],
    *,
    base: Arm = BASE,
    flags: tuple[str, ...] = TEXT,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> Study:
    """A study of what changes a model of 32 experts, in runs of 12M tokens."""
    arms = (base, *arms)
    return Study(
        name=name,
        question=question,
        paper=paper,
        arms=arms,
        seeds=seeds,
        steps=(2500,),
        flags=flags,
        minutes=10 * len(arms),
    )


STUDIES = {
    study.name: study
    for study in (
        Study(
            name="speedup",
            question="How many times fewer steps does a sparse language model need?",
            paper="Figures 1, 5 and 6: 7.5 times fewer for 64 experts against T5-Base",
            arms=(DENSE, *(experts(number) for number in (32, 128, 8, 2))),
            seeds=(0, 1, 2),
            steps=LENGTHS,
            flags=TEXT,
            minutes=5 * 65,
        ),
        Study(
            name="speedup_t5",
            question="The same of an encoder-decoder that continues the first half of its row?",
            paper="Figures 1, 5 and 6: 7.5 times fewer for 64 experts against T5-Base",
            arms=(with_encoder(DENSE), *(with_encoder(experts(number)) for number in (32, 128))),
            seeds=(0, 1, 2),
            steps=LENGTHS,
            flags=(*TEXT, *PREFIX),
            minutes=3 * 90,
        ),
        short(
            "rates",
            "Which learning rate is best for either side? Without a name it is 2.",
            "No table: one rate for all, that of T5",
            (BASE, *at_other_rates((DENSE, BASE)), experts(128), *at_other_rates((experts(128),))),
            base=DENSE,
            seeds=(0,),
        ),
        short(
            "rivals",
            "What is it that helps: routing that learns, or parameters alone?",
            "Section 2 compares with dense models alone",
            (
                replace(DENSE, expected="worse"),
                arm("random router", "--optim.router-lr 0", "worse"),
                variant("expert by hash", "hash", BASE, "--routing.capacity-factor none"),
                variant("table of bigrams", "bigrams", DENSE),
                Arm(
                    name="dense and as wide as all experts",
                    recipe="speedup_dense",
                    flags=("--model.d-ff", str(256 * int(EXPERTS))),
                ),
            ),
        ),
        Study(
            name="larger",
            question="Is a sparse model better than a dense one that costs 3.5 times as much?",
            paper="Figure 6: Switch-Base of 64 experts needs 2.5 times less time than T5-Large, "
            "which costs 3.5 times as much per token",
            arms=(
                Arm(name="dense of 3.5 times the FLOPs", recipe="speedup_dense", flags=LARGER),
                *(experts(number) for number in (32, 128)),
            ),
            seeds=(0,),
            steps=LENGTHS,
            flags=TEXT,
            minutes=4 * 65,
        ),
        short(
            "initialisation",
            "Does a tenth of T5's initialisation help, and at which rates?",
            "Table 3: after 3,500 steps 2.72 with a deviation of 0.01 over seeds, and 3.60 with "
            "0.68 at T5's own",
            (TENTH, *at_other_rates((BASE, TENTH))),
        ),
        short(
            "precision",
            "Must routers be in float32?",
            "Table 2: all in bfloat16 diverges (3.780), with routers in float32 it is as good as "
            "float32 (1.716 and 1.718)",
            (
                variant("bfloat16 but for routers", "selective", BASE, REFERENCE, "the same"),
                variant("bfloat16", "bfloat16", BASE, REFERENCE, "worse"),
            ),
        ),
        short(
            "attention",
            "Do experts in self-attention help?",
            "Table 10: after 100k steps 1.548 for experts in FFNs, 1.524 in attention, 1.513 in "
            "both; in bfloat16 those in attention diverge",
            (
                arm("experts in attention", "--routing.layers attention", "better"),
                arm("experts in both", "--routing.layers both", "better"),
            ),
        ),
        short(
            "no_token_left_behind",
            "Is it worth the while to give dropped tokens another expert?",
            "Appendix B: no benefit was seen",
            (
                with_encoder(arm("No-Token-Left-Behind", NTLB, "the same")),
                with_encoder(arm("capacity factor 1.0", "--routing.capacity-factor 1.0")),
                with_encoder(
                    arm(
                        "No-Token-Left-Behind at 1.0",
                        f"{NTLB} --routing.capacity-factor 1.0",
                        "the same",
                    )
                ),
            ),
            base=with_encoder(BASE),
            flags=(*TEXT, *PREFIX),
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
                arm("64 of half the width with top-2", FINER.format(64, 128, "top2", 2.5)),
                arm("128 of a quarter with top-4", FINER.format(128, 64, "top4", 5.0)),
                variant(
                    "64 of half the width and one for all tokens",
                    "shared",
                    arm("", "--routing.expert-d-ff 128 --routing.experts 64"),
                ),
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
                arm("the last block alone", "--routing.every 2", "worse"),
                variant("router initialised smaller", "small_router", BASE),
            ),
        ),
    )
}
"""Every study by its name; `switchworks lab` lists them."""
