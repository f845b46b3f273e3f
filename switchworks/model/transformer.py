"""The model: T5, with switch layers where the configuration asks for them.

An encoder and a decoder or, with `decoder_only`, the decoder alone as a causal language model:
the same blocks without cross-attention, for which the inputs are what comes before the targets.

Read last in `model/`. Single-device code; what makes it larger or faster (meshes, kernels,
compilation) is applied from outside.

Letters: B sequences, L encoder length, T decoder length, M memory length, D model width,
V vocabulary, H heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.batch import IGNORED, align_right, check_rows, shift_right
from switchworks.config import ConfigError
from switchworks.model.attention import causal, mask_to_bias, segment_mask
from switchworks.model.blocks import Stack
from switchworks.model.cache import DecoderCache, LayerCache
from switchworks.model.config import ModelConfig, Sampling
from switchworks.model.decoding import choose, decode_steps
from switchworks.model.init import initialise
from switchworks.model.layers import Embedding, Linear, Matmul, SharedDropout
from switchworks.model.losses import Losses, cross_entropy
from switchworks.model.switch_attention import SwitchAttention
from switchworks.model.switch_ffn import Routing, SwitchFFN


class Output(NamedTuple):
    """Logits and losses of inputs and targets, and the routing behind them."""

    logits: Float[Tensor, "B T V"]
    losses: Losses
    routing: tuple[Routing, ...]
    """One report per switch layer, in the order of `SwitchTransformer.switch_layers`."""


class Memory(NamedTuple):
    """The encoder's states, and which of them are real: the input of cross-attention."""

    states: Float[Tensor, "B M D"]
    segments: Int[Tensor, "B M"] | None
    """None: one example per row and no padding."""
    routing: tuple[Routing, ...]


class SwitchTransformer(nn.Module):
    """T5 (1.0 or 1.1), or a Switch Transformer when `config.routing` is set.

    Parameters get their initial values from `seed` (see `init.py`); on the meta device they stay
    without values.
    """

    letters = {"embedding.weight": "V D", "head.weight": "V D"}
    matmul: Matmul = staticmethod(F.linear)
    cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = staticmethod(cross_entropy)
    gather_logits: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # so that nothing is drawn twice
            self.embedding = Embedding(config.vocab_size, config.d_model)
            self.dropout = SharedDropout(config.dropout)
            self.encoder = None if config.decoder_only else Stack(config, decoder=False)
            self.decoder = Stack(config, decoder=True)
            self.head = None if config.tied_head else Linear(config.d_model, config.vocab_size)
        if device.type != "meta":
            self.to_empty(device=device)
            initialise(self, seed)

    def __repr__(self) -> str:
        """Sizes in a few lines; `print(model.decoder)` lists the modules of a stack."""
        from switchworks.model.sizes import summary  # made of this class

        return summary(self)

    @property
    def switch_layers(self) -> dict[str, SwitchFFN]:
        """Every switch layer by name, the encoder's first: "encoder.1", and for one in
        self-attention "encoder.1.attention", which comes before its block's FFN."""
        layers: dict[str, SwitchFFN] = {}
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            for number, block in enumerate(stack or ()):
                if isinstance(block.self_attention, SwitchAttention):
                    layers[f"{name}.{number}.attention"] = block.self_attention.switch
                if isinstance(block.ffn, SwitchFFN):
                    layers[f"{name}.{number}"] = block.ffn
        return layers

    def forward(
        self,
        inputs: Int[Tensor, "B L"],
        targets: Int[Tensor, "B T"],
        *,
        input_segments: Int[Tensor, "B L"] | None = None,
        target_segments: Int[Tensor, "B T"] | None = None,
        padding: bool = True,
    ) -> Output:
        """Logits of each target from the inputs and the targets before it, and the losses.

        Id 0 is padding. Segment ids keep packed examples apart (see `Batch`). `padding=False`
        promises that there are neither padding nor segments, and saves the masks.

        In a decoder-only model inputs and targets are one text, of which only the targets
        count in the loss: inputs are prompts, padded on either side, or have width 0.
        """
        check_rows(inputs, targets, input_segments, target_segments, self.config.decoder_only)
        targets = targets.masked_fill(targets == IGNORED, 0)
        memory, tokens, segments = None, targets, target_segments
        if self.encoder is None:
            tokens = torch.cat([align_right(inputs) if padding else inputs, targets], dim=1)
        else:
            # FSDP replaces `encode` of the instance by one that gathers weights, as has been done.
            memory = type(self).encode(self, inputs, segments=input_segments, padding=padding)
        segments = (tokens != 0).to(tokens.dtype) if segments is None and padding else segments
        x, routing = self._decode(shift_right(tokens, segments), segments, memory)
        logits = self.logits(x[:, tokens.shape[1] - targets.shape[1] :])
        if memory is not None:
            routing = (*memory.routing, *routing)
        return Output(logits, self._losses(logits, targets, routing), routing)

    def encode(
        self,
        inputs: Int[Tensor, "B L"],
        *,
        segments: Int[Tensor, "B L"] | None = None,
        padding: bool = True,
    ) -> Memory:
        """The encoder's states for `inputs`. Raises ConfigError if there is no encoder."""
        if self.encoder is None:
            raise ConfigError(
                "A decoder-only model has no encoder.\n"
                "  Use prefill(inputs, max_length), then decode_step."
            )
        if segments is None and padding:
            segments = (inputs != 0).to(inputs.dtype)
        x = self.dropout(self.embedding(inputs))
        bias = self.encoder.relative_bias(inputs.shape[1], inputs.shape[1])
        if segments is not None:
            mask = segment_mask(segments, segments)
            if self.config.routing is not None and self.config.routing.padding_takes_slots:
                # Padding then is routed by its states, so it attends as in transformers: to text.
                mask = mask | (segments == 0)[:, None, :, None]
                mask = mask & (segments != 0)[:, None, None]
            bias = bias + mask_to_bias(mask, bias.dtype)
        x, routing = self.encoder(x, bias, segments=segments)
        return Memory(x, segments, routing)

    def init_cache(self, memory: Memory, max_length: int) -> DecoderCache:
        """An empty cache for up to `max_length` tokens: cross-attention is projected once."""
        real = None if memory.segments is None else (memory.segments != 0)[:, None, None]
        bias = None if real is None else mask_to_bias(real, memory.states.dtype)
        return self._cache(memory.states, max_length, memory_bias=bias)

    def prefill(
        self, prompts: Int[Tensor, "B L"], max_length: int
    ) -> tuple[Float[Tensor, "B 1 V"], DecoderCache]:
        """Decoder-only: the logits after each prompt, computed in one pass, and the cache.

        The cache has room for `max_length` tokens more. Prompts may be padded with id 0 on either
        side, down to none; a continuation does not depend on how far.
        """
        tokens = F.pad(align_right(prompts), (0, 1), value=1)  # in place of the next token
        segments = (tokens != 0).to(tokens.dtype)
        x = self.embedding(shift_right(tokens, segments))
        room = tokens.shape[1] + max_length - 1
        bias = mask_to_bias((segments != 0)[:, None, None], x.dtype)
        cache = self._cache(x, room, prompt_bias=bias)
        return self.gather_logits(self._decode_step(x, cache, segments)[:, -1:]), cache

    def decode_step(
        self, tokens: Int[Tensor, "B T"], cache: DecoderCache
    ) -> Float[Tensor, "B T V"]:
        """Logits for the positions after `tokens`, which follow those in `cache`."""
        return self.gather_logits(self._decode_step(self.embedding(tokens), cache, None))

    def _decode_step(self, x: Tensor, cache: DecoderCache, segments: Tensor | None) -> Tensor:
        first, count = cache.layers[0].length, x.shape[1]
        assert isinstance(first, int)
        bias = cache.last_bias[..., -first - 1 :]
        if count > 1:
            bias = self.decoder.relative_bias(count, first + count, first)
            bias = bias + mask_to_bias(causal(count, first + count, x.device), bias.dtype)
        if cache.prompt_bias is not None:
            written = first + count - cache.prompt_bias.shape[-1]
            bias = bias + F.pad(cache.prompt_bias, (0, written))
        x, _ = self.decoder(x, bias, segments=segments, cache=cache, memory_bias=cache.memory_bias)
        return self.logits(x)

    def _cache(self, states: Tensor, room: int, **masks: Tensor | None) -> DecoderCache:
        """Room for `room` keys. `states` are the encoder's, if there is one."""
        with torch.no_grad():
            last_bias = self.decoder.relative_bias(1, room, room - 1)
        assert isinstance(last_bias, Tensor)
        memory = [None if self.encoder is None else block.project(states) for block in self.decoder]
        return DecoderCache([LayerCache(room, each) for each in memory], last_bias, **masks)

    def generate(
        self,
        inputs: Int[Tensor, "B L"],
        *,
        max_length: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Int[Tensor, "B T"]:
        """The tokens written for `inputs`: greedy at temperature 0, else sampled.

        Each row is ended by EOS (id 1) and padded with 0. In a decoder-only model the inputs are
        prompts, and the tokens are what follows them. Beams, constraints, scores, streaming and a
        compiled step are in `switchworks.generate`, which builds on the model and not the reverse.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        draws = torch.Generator(inputs.device).manual_seed(seed)
        steps = decode_steps(self, inputs, max_length, lambda x, _: choose(x, sampling, draws))
        return torch.stack([*steps], dim=1)

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Scores over the vocabulary for decoder states `x`, in their dtype."""
        if self.head is not None:
            return self.head(x)
        return self.matmul(x * self.config.d_model**-0.5, self.embedding.weight)

    def _decode(
        self, tokens: Tensor, segments: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Teacher forcing: the decoder's states for every position, and its layers' reports."""
        length = tokens.shape[1]
        x = self.dropout(self.embedding(tokens))
        mask = causal(length, length, tokens.device)
        memory_bias = None
        if segments is not None:
            mask = mask & segment_mask(segments, segments)
        if segments is not None and memory is not None:
            keys = memory.segments
            if keys is None:
                keys = torch.ones(memory.states.shape[:2], dtype=segments.dtype).to(x.device)
            memory_bias = mask_to_bias(segment_mask(segments, keys), x.dtype)
        bias = self.decoder.relative_bias(length, length) + mask_to_bias(mask, x.dtype)
        states = None if memory is None else memory.states
        return self.decoder(x, bias, segments=segments, memory=states, memory_bias=memory_bias)

    def _losses(self, logits: Tensor, targets: Tensor, routing: tuple[Routing, ...]) -> Losses:
        nll, squared_log_z = self.cross_entropy(logits, targets)
        output_z = self.config.z_loss * squared_log_z
        zero, sparse = nll.new_zeros(()), self.config.routing
        pairs = zip(self.switch_layers.values(), routing, strict=True)
        balance = sum((layer.balance_weight * report.balance for layer, report in pairs), zero)
        router_z = sum((r.router_z for r in routing), zero) * (sparse.z_weight if sparse else 0.0)
        total = nll + output_z + balance + router_z
        return Losses(total, nll, output_z, balance, router_z)
