"""A text token by token: which experts read each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from switchworks.batch import Batch
from switchworks.compress import route_batch
from switchworks.config import CheckpointError
from switchworks.data import Tokenizer
from switchworks.evaluate.routing import experts_of, tokens_read
from switchworks.model import SwitchTransformer


class RoutedToken(NamedTuple):
    """A token as text, and the experts that a layer sends it to, by their numbers."""

    text: str
    experts: tuple[int, ...]


def token_experts(
    model: SwitchTransformer, tokenizer: Tokenizer, text: str, answer: Sequence[int] = ()
) -> dict[str, list[RoutedToken]]:
    """The tokens that each switch layer of `model` reads, by the layer's name: of an encoder those
    of `text`, of a decoder those of `answer` behind its start token (of a decoder-only model those
    of both). As in any evaluation no token is dropped. Raises CheckpointError for a dense model.
    """
    if not model.switch_layers:
        raise CheckpointError("This model is dense: it has no experts.\n  Give a sparse one.")
    ids, end = tokenizer.encode(text), [tokenizer.eos_id]
    inputs = [] if model.config.decoder_only else [*ids, *end]
    targets = [*ids, *answer, *end] if model.config.decoder_only else [*answer, *end]
    batch = Batch(inputs=torch.tensor([inputs], dtype=torch.long), targets=torch.tensor([targets]))
    return {
        name: [
            RoutedToken(token_text(tokenizer, token), tuple(members.nonzero().flatten().tolist()))
            for token, members in zip(
                tokens_read(model, batch, name)[0].tolist(), experts_of(routed), strict=True
            )
        ]
        for name, routed in route_batch(model, batch).items()
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; of special ones their name."""
    names = {tokenizer.pad_id: "<start>", tokenizer.eos_id: "</s>"}
    return tokenizer.piece(token) or names.get(token) or tokenizer.decode([token])
