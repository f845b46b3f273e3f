"""The model: T5, with switch layers where the configuration asks for them.

An encoder and a decoder or, with `decoder_only`, the decoder alone as a causal language model:
the same blocks without cross-attention, for which the inputs are what comes before the targets.

Read last in `model/`. Single-device code; what makes it larger or faster (meshes, kernels,
compilation) is applied from outside.

Letters: B sequences, L encoder length, T decoder length, M memory length, D model width,
V vocabulary, H heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.config import ConfigError
from switchworks.model.attention import causal, mask_to_bias, segment_mask
from switchworks.model.blocks import Stack
from switchworks.model.cache import DecoderCache, LayerCache
from switchworks.model.config import ModelConfig
from switchworks.model.init import initialise
from switchworks.model.layers import Embedding, SharedDropout
from switchworks.model.losses import Losses, cross_entropy
from switchworks.model.switch_attention import SwitchAttention
from switchworks.model.switch_ffn import Routing, SwitchFFN


class Output(NamedTuple):
    """What the model answers to inputs and targets."""

    logits: Float[Tensor, "B T V"]
    losses: Losses
    routing: tuple[Routing, ...]
    """One report per switch layer, in the order of `SwitchTransformer.switch_layers`."""


class Memory(NamedTuple):
    """What the decoder reads: the encoder's states and which of them are real."""

    states: Float[Tensor, "B M D"]
    segments: Int[Tensor, "B M"] | None
    """None: one example per row and no padding."""
    routing: tuple[Routing, ...]


class SwitchTransformer(nn.Module):
    """T5 (1.0 or 1.1), or a Switch Transformer when `config.routing` is set.

    Parameters get their first values from `seed` (see `init.py`); on the meta device they stay
    without values.
    """

    letters = {"embedding.weight": "V D", "head.weight": "V D"}  # noqa: RUF012

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # so that nothing is drawn twice
            self.embedding = Embedding(config.vocab_size, config.d_model)
            self.dropout = SharedDropout(config.dropout)
            self.encoder = (
                None
                if config.decoder_only
                else Stack(config, layers=config.num_layers, decoder=False)
            )
            self.decoder = Stack(config, layers=config.decoder_layers, decoder=True)
            self.head = (
                None
                if config.tied_head
                else nn.Linear(config.d_model, config.vocab_size, bias=False)
            )
        self.cross_entropy = cross_entropy  # an attribute, for models whose logits are in parts
        if device.type != "meta":
            self.to_empty(device=device)
            initialise(self, seed)

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

        A decoder-only model reads inputs and targets as one text, of which only the targets
        count in the loss: inputs are prompts, padded on either side, or have width 0.
        """
        _check(inputs, targets, input_segments, target_segments, alone=self.encoder is None)
        memory, tokens, segments = None, targets, target_segments
        if self.encoder is None:
            tokens = torch.cat([align_right(inputs) if padding else inputs, targets], dim=1)
        else:
            # Past whatever `encode` of this one object is where weights have to be gathered first.
            memory = type(self).encode(self, inputs, segments=input_segments, padding=padding)
        if segments is None and padding:
            segments = (tokens != 0).to(tokens.dtype)
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
                "  Use read_prompts(inputs, max_length), then decode_next."
            )
        if segments is None and padding:
            segments = (inputs != 0).to(inputs.dtype)
        x = self.dropout(self.embedding(inputs))
        bias = self.encoder.relative_bias(inputs.shape[1], inputs.shape[1])
        if segments is not None:
            seen = segment_mask(segments, segments)
            if self.config.routing is not None and self.config.routing.padding_takes_slots:
                # Whose slots padding takes depends on what it reads: in transformers, the text.
                seen = seen | (segments == 0)[:, None, :, None]
                seen = seen & (segments != 0)[:, None, None]
            bias = bias + mask_to_bias(seen, bias.dtype)
        x, routing = self.encoder(x, bias, segments=segments)
        return Memory(x, segments, routing)

    def init_cache(self, memory: Memory, max_length: int) -> DecoderCache:
        """An empty cache for up to `max_length` tokens: cross-attention is projected once."""
        states, segments = memory.states, memory.segments
        hidden = (
            None if segments is None else mask_to_bias((segments != 0)[:, None, None], states.dtype)
        )
        return self._cache(states, max_length, memory_bias=hidden)

    def prefill(
        self, prompts: Int[Tensor, "B L"], max_length: int
    ) -> tuple[Float[Tensor, "B 1 V"], DecoderCache]:
        """Decoder-only: the logits of what follows each prompt, read in one pass, and the cache.

        The cache has room for `max_length` tokens more. Prompts may be padded with id 0 on either
        side, down to none; a continuation does not depend on how far.
        """
        tokens = F.pad(align_right(prompts), (0, 1), value=1)  # stands for the token to come
        segments = (tokens != 0).to(tokens.dtype)
        x = self.embedding(shift_right(tokens, segments))
        room = tokens.shape[1] + max_length - 1
        cache = self._cache(
            x, room, prompt_bias=mask_to_bias((segments != 0)[:, None, None], x.dtype)
        )
        return self._decode_step(x, cache, segments)[:, -1:], cache

    def decode_step(
        self, tokens: Int[Tensor, "B T"], cache: DecoderCache
    ) -> Float[Tensor, "B T V"]:
        """Logits for the positions after `tokens`, which follow what `cache` has already seen."""
        return self._decode_step(self.embedding(tokens), cache, None)

    def _decode_step(self, x: Tensor, cache: DecoderCache, segments: Tensor | None) -> Tensor:
        first, count = cache.layers[0].length, x.shape[1]
        bias = cache.last_bias[..., -first - 1 :]
        if count > 1:
            bias = self.decoder.relative_bias(count, first + count, first)
            bias = bias + mask_to_bias(causal(count, first + count, x.device), bias.dtype)
        if cache.prompt_bias is not None:
            written = first + count - cache.prompt_bias.shape[-1]
            bias = bias + F.pad(cache.prompt_bias, (0, written))
        x, _ = self.decoder(x, bias, segments=segments, cache=cache, memory_bias=cache.memory_bias)
        return self.logits(x)

    def _cache(self, like: Tensor, room: int, **hidden: Tensor | None) -> DecoderCache:
        """Room for `room` keys, of as many heads as each block has here. `like` is what there is
        before the first: the encoder's states, or a prompt."""
        with torch.no_grad():
            last_bias = self.decoder.relative_bias(1, room, room - 1)
        assert isinstance(last_bias, Tensor)
        layers = []
        for block in self.decoder:
            shape = len(like), block.self_attention.num_heads, room, self.config.d_kv
            memory = None if self.encoder is None else block.project(like)
            layers.append(LayerCache(like.new_zeros(shape), memory))
        return DecoderCache(layers, last_bias, **hidden)

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
        """The tokens the model writes for `inputs`: greedy at temperature 0, else sampled.

        For a decoder-only model the inputs are prompts, and the tokens what follows them.

        A convenience for `switchworks.generate`, and the only place where the model looks up the
        ladder.
        """
        from switchworks.generate import Sampling, generate

        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return generate(self, inputs, max_length=max_length, sampling=sampling)

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Scores over the vocabulary for decoder states `x`, in their dtype."""
        if self.head is not None:
            return self.head(x)
        return F.linear(x * self.config.d_model**-0.5, self.embedding.weight)

    def _decode(
        self, tokens: Tensor, segments: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Teacher forcing: the decoder's states for every position, and its layers' reports."""
        length = tokens.shape[1]
        x = self.dropout(self.embedding(tokens))
        seen = causal(length, length, tokens.device)
        memory_bias = None
        if segments is not None:
            seen = seen & segment_mask(segments, segments)
        if segments is not None and memory is not None:
            keys = memory.segments
            if keys is None:
                keys = torch.ones(memory.states.shape[:2], dtype=segments.dtype).to(x.device)
            memory_bias = mask_to_bias(segment_mask(segments, keys), x.dtype)
        bias = self.decoder.relative_bias(length, length) + mask_to_bias(seen, x.dtype)
        states = None if memory is None else memory.states
        return self.decoder(x, bias, segments=segments, memory=states, memory_bias=memory_bias)

    def _losses(self, logits: Tensor, targets: Tensor, routing: tuple[Routing, ...]) -> Losses:
        nats, squared_log_z = self.cross_entropy(logits, targets)
        output_z = self.config.z_loss * squared_log_z
        balance, router_z = nats.new_zeros(()), nats.new_zeros(())
        weights = self.config.routing
        if weights is not None:
            layers = self.switch_layers.values()
            for layer, report in zip(layers, routing, strict=True):
                balance = balance + layer.balance_weight * report.balance
            router_z = weights.z_weight * sum((r.router_z for r in routing), router_z)
        total = nats + output_z + balance + router_z
        return Losses(total, nats, output_z, balance, router_z)


def _check(
    inputs: Tensor,
    targets: Tensor,
    input_segments: Tensor | None,
    target_segments: Tensor | None,
    *,
    alone: bool,
) -> None:
    if inputs.shape[0] != targets.shape[0]:
        raise ConfigError(
            f"{inputs.shape[0]} rows of inputs but {targets.shape[0]} rows of targets.\n"
            "  Both need one row per sequence."
        )
    if (input_segments is None) != (target_segments is None):
        given = "target_segments" if input_segments is None else "input_segments"
        raise ConfigError(
            f"Only {given} is given, so packed targets would read the wrong inputs.\n"
            "  Give segment ids for both, or for neither."
        )
    if alone and target_segments is not None and inputs.shape[1]:
        raise ConfigError(
            f"{inputs.shape[1]} positions of inputs beside packed targets: a decoder-only model "
            "reads a row as one text.\n"
            "  Put each prompt before its own targets and give inputs of width 0."
        )


def shift_right(
    targets: Int[Tensor, "B T"], segments: Int[Tensor, "B T"] | None
) -> Int[Tensor, "B T"]:
    """What the decoder reads: each segment moved by one position, starting with id 0 (T5)."""
    shifted = F.pad(targets[:, :-1], (1, 0))
    if segments is None:
        return shifted
    return torch.where(segments == F.pad(segments[:, :-1], (1, 0), value=-1), shifted, 0)


def align_right(prompts: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Each row's tokens in their order behind its padding (id 0), wherever that stood before."""
    return prompts.gather(1, (prompts != 0).to(torch.uint8).argsort(dim=1, stable=True))
