"""One call for what most programs want of a model: holes filled, texts continued."""

from collections.abc import Sequence
from typing import TypeVar

from switchworks.config import ConfigError
from switchworks.data import Tokenizer
from switchworks.generate.batches import GenerationConfig
from switchworks.generate.texts import HOLE, write_texts
from switchworks.model import SwitchTransformer

Texts = TypeVar("Texts", str, list[str])


def fill(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: Texts,
    config: GenerationConfig | None = None,
) -> Texts:
    """`text`, or each of several, with its holes <extra_id_0>, <extra_id_1>, ... filled in square
    brackets. Several are computed together. Raises ConfigError for a decoder-only model, which
    fills no holes, and for a text without one."""
    texts = [text] if isinstance(text, str) else text
    if model.config.decoder_only:
        raise ConfigError("A decoder-only model fills no holes.\n  Use switchworks.continue_.")
    if without := [each for each in texts if not HOLE.search(each)]:
        raise ConfigError(
            f"{without[0][:40]!r} has no hole.\n  Put <extra_id_0> where the model should write."
        )
    return _written(model, tokenizer, text, config)


def continue_(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: Texts,
    config: GenerationConfig | None = None,
) -> Texts:
    """`text`, or each of several, and what the model writes behind it: an encoder-decoder in square
    brackets, as the fill of a hole at the end. Raises ConfigError for a text with holes."""
    texts = [text] if isinstance(text, str) else text
    if holes := [each for each in texts if HOLE.search(each)]:
        raise ConfigError(f"{holes[0][:40]!r} has holes.\n  Use switchworks.fill.")
    return _written(model, tokenizer, text, config)


def _written(
    model: SwitchTransformer, tokenizer: Tokenizer, text: Texts, config: GenerationConfig | None
) -> Texts:
    texts: Sequence[str] = [text] if isinstance(text, str) else text
    written = write_texts(model, tokenizer, texts, config or GenerationConfig())
    return written[0] if isinstance(text, str) else written  # pyright: ignore[reportReturnType]
