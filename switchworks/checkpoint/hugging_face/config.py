"""config.json of transformers' T5, mT5 and Switch models <-> ModelConfig."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_type_hints

from switchworks.config import CheckpointError, ConfigError, checked
from switchworks.model import MAX_LAYERS, Activation, ModelConfig, RoutingConfig

_SAME = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers")
_NAMES = {name: name for name in _SAME} | {
    "dropout": "dropout_rate",
    "norm_epsilon": "layer_norm_epsilon",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
}
"""ModelConfig's name -> that in config.json, where only the name differs."""
_ROUTING_NAMES = {
    "experts": "num_experts",
    "jitter": "router_jitter_noise",
    "balance_weight": "router_aux_loss_coef",
    "z_weight": "router_z_loss_coef",
}
_HF_DEFAULTS: dict[str, Any] = {
    "num_decoder_layers": None,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "router_jitter_noise": 0.01,
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": 0.001,
    "expert_capacity": 64,
}
"""Defaults of transformers for what an older config.json lacks."""
_ACTIVATIONS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gelu_new": ("gelu", False),
    "gelu_pytorch_tanh": ("gelu", False),
    "silu": ("silu", False),
    "gated-relu": ("relu", True),
    "gated-gelu": ("gelu", True),
    "gated-gelu_new": ("gelu", True),
    "gated-gelu_pytorch_tanh": ("gelu", True),
    "gated-silu": ("silu", True),
}
"""transformers' name -> (activation, gated). Its plain "gelu" is the exact form: not supported."""
_UNLIMITED = 2**31 - 1

Capacity = Literal["paper", "hf"]
"""The rule for how many tokens an expert takes, see `load_hf`."""


def from_hf_config(
    values: Mapping[str, Any], names: Iterable[str], capacity: Capacity = "paper"
) -> ModelConfig:
    """The ModelConfig of a transformers config and the `names` of the tensors beside it.

    `capacity` "paper" keeps the defaults of RoutingConfig, "hf" takes over the fixed number of
    tokens per expert and sequence, padding included. Raises CheckpointError naming a setting that
    cannot be expressed.
    """
    names = list(names)
    kind = str(values.get("model_type"))
    _refuse_other_kinds(kind, names)
    _refuse_other_ids(values)
    sparse = kind == "switch_transformers"
    activation, gated = _activation(values, "gated-gelu" if kind == "mt5" else "relu", sparse)
    if sparse:  # a Switch configuration has no setting for gates: the tensors' names decide
        gated = gated or any(name.endswith(".wi_0.weight") for name in names)
    settings = _typed(values, ModelConfig, _NAMES)
    try:
        return ModelConfig(
            **settings,
            activation=activation,
            gated=gated,
            tied_head=_is_tied(values, kind),
            routing=_routing(values, names, settings, capacity) if sparse else None,
        )
    except ConfigError as error:
        raise CheckpointError(
            f"config.json describes no model that can be built: {error}"
        ) from error


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises CheckpointError for what transformers cannot express."""
    if config.decoder_only:
        raise CheckpointError(
            "model.decoder_only = true cannot be written for transformers, whose T5 and Switch "
            "Transformers have an encoder.\n  Use switchworks' own format."
        )
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    values |= {
        "num_decoder_layers": config.decoder_layers,
        "tie_word_embeddings": config.tied_head,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    name = next(
        name for name, ours in _ACTIVATIONS.items() if ours == (config.activation, config.gated)
    )
    if config.routing is None:
        return values | {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "feed_forward_proj": name,
            "scale_decoder_outputs": config.tied_head,
        }
    _refuse_other_routing(config, config.routing)
    return values | _sparse_values(config, config.routing) | {"dense_act_fn": name}


def _typed(values: Mapping[str, Any], kind: type, names: Mapping[str, str]) -> dict[str, Any]:
    """The settings `names` of `kind`, a dataclass, out of a config.json. Raises CheckpointError for
    one that is missing or of another type."""
    hints = get_type_hints(kind)
    try:
        return {
            ours: checked(hints[ours], _get(values, theirs), f"config.json: {theirs}")
            for ours, theirs in names.items()
        }
    except ConfigError as error:
        raise CheckpointError(f"{error}\n  Or fetch it again.") from error


def _get(values: Mapping[str, Any], name: str) -> Any:
    if name not in values and name not in _HF_DEFAULTS:
        raise CheckpointError(f"config.json does not say {name}.\n  Add it, or fetch it again.")
    return values.get(name, _HF_DEFAULTS.get(name))


def _refuse_other_kinds(kind: str, names: list[str]) -> None:
    if kind not in ("t5", "mt5", "switch_transformers"):
        reason = ": its layers have a relative bias each" if kind == "umt5" else ""
        raise CheckpointError(
            f"model_type = {kind!r} cannot be read{reason}.\n"
            "  Models of type t5, mt5 and switch_transformers can."
        )
    if {name.partition(".")[0] for name in names} == {"shared", "encoder"}:
        raise CheckpointError(
            "The checkpoint is an encoder alone (such as T5EncoderModel), and every model here has "
            "a decoder.\n  Load the whole model it came from and call encode(inputs), which gives "
            "the same states."
        )


def _refuse_other_ids(values: Mapping[str, Any]) -> None:
    for name, ours in (("pad_token_id", 0), ("decoder_start_token_id", 0), ("eos_token_id", 1)):
        if values.get(name) not in (None, ours, [ours]):
            raise CheckpointError(
                f"{name} = {values[name]} cannot be read: here id 0 is padding and starts the "
                "decoder, and id 1 ends a text.\n  Only such models can be converted."
            )


def _activation(values: Mapping[str, Any], default: str, sparse: bool) -> tuple[Activation, bool]:
    """The activation, and whether the configuration mentions a gate. Switch models have
    dense_act_fn; older ones, and all with gates, also feed_forward_proj."""
    key = "feed_forward_proj"
    if sparse and not str(values.get(key, "")).startswith("gated-"):
        key = "dense_act_fn"
    name = values.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{key} = {name!r} cannot be read.\n  Known: {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _is_tied(values: Mapping[str, Any], kind: str) -> bool:
    """Whether the output is scaled by d_model ** -0.5, which in this family means tied.
    transformers 5 writes tie_word_embeddings = true for every T5, and the actual value as
    scale_decoder_outputs; mT5 never scales."""
    for name in ("tie_word_embeddings", "scale_decoder_outputs"):
        if not isinstance(values.get(name), bool | None):
            raise CheckpointError(
                f"config.json: {name} = {values[name]!r} is neither true nor false.\n"
                "  Mend it, or fetch it again."
            )
    tied = values.get("tie_word_embeddings", True) is not False
    if kind == "t5":
        return bool(values.get("scale_decoder_outputs", tied))
    return tied and kind != "mt5"


def _routing(
    values: Mapping[str, Any], names: Iterable[str], settings: Mapping[str, Any], capacity: Capacity
) -> RoutingConfig | None:
    """The routing of a Switch model; the tensors' names show which blocks are sparse."""
    if values.get("router_bias"):
        raise CheckpointError("router_bias = true: no router has one here.\n  Use another model.")
    sparse: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
    for name in names:
        if match := re.match(r"(encoder|decoder)\.block\.(\d+)\..*\.router\.", name):
            sparse[match[1]].add(int(match[2]))
    encoder, decoder = sparse["encoder"], sparse["decoder"]
    if not encoder and not decoder:
        return None
    layers = settings["num_layers"], settings["num_decoder_layers"] or settings["num_layers"]
    if max(layers) > MAX_LAYERS:  # before so many are looked at
        raise CheckpointError(
            f"config.json: {max(layers):,} layers exceed {MAX_LAYERS:,}.\n  Fetch it again."
        )
    chosen = _typed(values, RoutingConfig, _ROUTING_NAMES)
    if capacity == "hf":
        chosen |= _typed(values, RoutingConfig, {"expert_capacity": "expert_capacity"})
        chosen["padding_takes_slots"] = True
    for every in range(1, max(layers) + 1):
        if [_sparse_blocks(count, every) for count in layers] == [encoder, decoder]:
            return RoutingConfig(**chosen, every=every)
    blocks = tuple(sorted(encoder)), tuple(sorted(decoder))
    return RoutingConfig(**chosen, encoder_blocks=blocks[0], decoder_blocks=blocks[1])


def _sparse_blocks(layers: int, every: int) -> set[int]:
    return {block for block in range(layers) if block % every == every - 1}


def _refuse_other_routing(config: ModelConfig, routing: RoutingConfig) -> None:
    """Raises CheckpointError if the model would compute something else in transformers."""
    strategies = {routing.strategy, routing.decoder_strategy or routing.strategy}

    def refuse(is_refused: bool, setting: str, reason: str) -> None:
        if is_refused:
            raise CheckpointError(
                f"{setting} cannot be written for transformers, {reason}.\n"
                "  Use switchworks' own format."
            )

    names, layers = " and ".join(sorted(strategies)), routing.layers
    refuse(config.gated, "model.gated = true with routing", "whose experts have no gate")
    refuse(names != "switch", f"routing.strategy = {names}", "which sends each token to one expert")
    refuse(layers != "ffn", f"routing.layers = {layers}", "which has experts in FFN layers only")
    width = f"routing.expert_d_ff = {routing.expert_d_ff}"
    refuse(routing.expert_d_ff is not None, width, "whose experts have the width of other FFNs")
    rate, capacity = routing.bias_rate, routing.expert_capacity
    refuse(rate > 0, f"routing.bias_rate = {rate}", "whose routers have no selection bias")
    sequences = routing.group_sequences
    setting = f"routing.expert_capacity = {capacity} over routing.group_sequences = {sequences}"
    refuse(capacity is not None and sequences > 1, setting, "which counts in each sequence")


def _sparse_values(config: ModelConfig, routing: RoutingConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        theirs: getattr(routing, ours) for ours, theirs in _ROUTING_NAMES.items()
    }
    if routing.exploration != "input_jitter":
        values["router_jitter_noise"] = 0.0
    for stack, layers in (("encoder", config.num_layers), ("decoder", config.decoder_layers)):
        count = _num_sparse(layers, set(config.sparse_blocks(stack == "decoder")))
        values[f"num_sparse_{stack}_layers"] = count
        values[f"{stack}_sparse_step"] = layers // count
    return values | {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "expert_capacity": routing.expert_capacity or _UNLIMITED,
        "router_bias": False,
        "router_dtype": "float32",
    }


def _num_sparse(layers: int, blocks: set[int]) -> int:
    """The num_sparse_layers with which transformers makes `blocks` sparse. Its rule: with step =
    layers // number, blocks 1, 1 + step, ... or, if step is 1, all. A step of 0, from a number
    beyond the layers, makes none sparse."""
    for number in range(1, layers + 2):
        step = layers // number
        if blocks == {b for b in range(layers) if step == 1 or (step > 1 and b % step == 1)}:
            return number
    raise CheckpointError(
        f"Sparse blocks {sorted(blocks)} of {layers} cannot be written for transformers, which "
        "makes every so many sparse, beginning with block 1.\n  It can with routing.every 1 or 2."
    )
