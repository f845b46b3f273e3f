"""Models that are no part of switchworks, trained by its command: rivals of learned routing.

    python experiments/variants.py hash train speedup --routing.experts 32 ...

- hash: a token's expert is a fixed random function of its id (Roller et al. 2021, random hash).
- bigrams: a table of vectors for pairs of tokens, hashed into as many rows as 31 more experts of
  `speedup` have parameters; the vector of each pair is added to its second token's embedding.
- shared: each block's experts stand beside a dense FFN of their width that every token uses
  (DeepSeekMoE). At `--routing.expert-d-ff 128` the two cost as much as one expert of `speedup`.
- selective: what is handed on between layers is rounded to bfloat16, but not in routers, as
  section 2.4 of the paper has it. Everything is summed up in float32, as tensor cores do, so this
  runs on any processor. Use it with --precision float32 --kernels reference.
- bfloat16: the same, and routers score and choose in bfloat16 as well.
- small_router: routers initialised with a tenth of the variance.

Everything but the model is the package's: text, optimizer, loop, run directory. Their exported
weights open only here.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchworks.cli.main import main
from switchworks.model import (
    FFN,
    Embedding,
    Experts,
    Linear,
    Matmul,
    ModelConfig,
    RMSNorm,
    Router,
    Stack,
    SwitchFFN,
    SwitchTransformer,
)
from switchworks.model.init import initialise

ROWS = 31_744
"""31 experts x 2 blocks x 2 matrices x 64 x 256 parameters, over a width of 64."""
CERTAIN = 30.0
"""A logit beside zeros: the gate of the expert is 1 in float32."""


class HashRouter(Router):
    """Sends every token to the expert that `table` has for its id."""

    def __init__(self, router: Router, table: Tensor, ids: Callable[[], Tensor]) -> None:
        super().__init__(router.weight.shape[1], router.config)
        self.weight = router.weight
        self.table, self.ids = table, ids

    def logits(self, x: Tensor) -> Tensor:
        expert = self.table.to(x.device)[self.ids()].view(x.shape[:2])
        return CERTAIN * F.one_hot(expert, self.config.experts).to(x.dtype)


class Hashed(SwitchTransformer):
    """Every switch layer by the same random table, which the seed of the run draws."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        assert config.routing is not None
        generator = torch.Generator().manual_seed(seed)
        size, seen = (config.vocab_size,), list[Tensor]()
        with torch.device("cpu"):
            table = torch.randint(config.routing.experts, size, generator=generator)
        look_up = self.embedding.look_up

        def remember(weight: Tensor, ids: Tensor) -> Tensor:
            seen[:] = [ids]
            return look_up(weight, ids)

        self.embedding.look_up = remember
        for layer in self.switch_layers.values():
            layer.router = HashRouter(layer.router, table, lambda: seen[0])


class WithBigrams(SwitchTransformer):
    """A vector for each hashed pair of neighbours, added to the embedding of the second."""

    letters: ClassVar = {**SwitchTransformer.letters, "bigrams": "V D"}

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        generator = torch.Generator().manual_seed(seed)
        values = torch.zeros(ROWS, config.d_model)
        if not values.is_meta:
            values.normal_(0.0, 0.1, generator=generator)
        self.bigrams = nn.Parameter(values)
        look_up = self.embedding.look_up

        def with_pairs(weight: Tensor, ids: Tensor) -> Tensor:
            before = F.pad(ids, (1, 0))[..., :-1]
            pair = (ids + before * config.vocab_size) * 2_654_435_761 % 2**32 % ROWS
            return look_up(weight, ids) + look_up(self.bigrams, pair)

        self.embedding.look_up = with_pairs


class SharedSwitchFFN(SwitchFFN):
    """A switch layer and a dense FFN as wide as one of its experts, added."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.routing is not None
        width = config.routing.expert_d_ff or config.d_ff
        form: dict[str, Any] = {"activation": config.activation, "gated": config.gated}
        super().__init__(config.d_model, width, config.routing, causal=True, **form)
        self.shared = FFN(replace(config, d_ff=width))

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Any]:
        y, routing = super().forward(x, real)
        return y + self.shared(x), routing


class WithShared(SwitchTransformer):
    """A decoder with a shared expert in every sparse block."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        for number in config.sparse_blocks(decoder=True):
            self.decoder.blocks[number].ffn = SharedSwitchFFN(config)
        initialise(self, seed)


class Round(torch.autograd.Function):
    """The nearest number of bfloat16, in the dtype it had; also of the gradient."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient.bfloat16().to(gradient.dtype)


def rounded(x: Tensor) -> Tensor:
    return cast(Tensor, Round.apply(x))


def round_matmul(matmul: Matmul) -> Matmul:
    """`matmul` of rounded factors, rounded."""
    return lambda x, weight: rounded(matmul(rounded(x), rounded(weight)))


def round_result(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: rounded(function(*inputs))


def call_and_round(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    x, reports = block(*inputs, **options)
    return rounded(x), reports


class Selective(SwitchTransformer):
    """Rounds to bfloat16 what leaves linear layers, experts, norms, look-ups and blocks."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.matmul = round_matmul(module.matmul)
            elif isinstance(module, RMSNorm):
                module.normalise = round_result(module.normalise)
            elif isinstance(module, Embedding):
                module.look_up = round_result(module.look_up)
            elif isinstance(module, Stack):
                module.call_block = call_and_round


class NarrowRouter(Router):
    """Scores tokens in bfloat16, and so their softmax and their gates are in it, too."""

    def __init__(self, router: Router) -> None:
        super().__init__(router.weight.shape[1], router.config)
        self.weight = router.weight

    def forward(self, x: Tensor) -> Tensor:
        narrow = x.bfloat16()
        if self.training:
            narrow = self._explore(narrow)
        return self.logits(narrow.float()).bfloat16()

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.bfloat16().float())


class Narrow(Selective):
    """`Selective`, and routers in bfloat16, too."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        for layer in self.switch_layers.values():
            layer.router = NarrowRouter(layer.router)


class SmallRouters(SwitchTransformer):
    """Routers that begin nearer to zero, and so with gates nearer to each other."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        for layer in self.switch_layers.values():
            layer.router.weight.data *= 0.1**0.5


VARIANTS: dict[str, type[SwitchTransformer]] = {
    "hash": Hashed,
    "bigrams": WithBigrams,
    "shared": WithShared,
    "selective": Selective,
    "bfloat16": Narrow,
    "small_router": SmallRouters,
}


def run(words: list[str]) -> int:
    """Train the variant `words[0]`; the rest is a command line of switchworks."""
    if not words or words[0] not in VARIANTS:
        print(f"usage: variants.py {{{','.join(VARIANTS)}}} train RECIPE ...", file=sys.stderr)
        return 2
    from switchworks.training import state

    state.SwitchTransformer = VARIANTS[words[0]]
    return main(words[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
