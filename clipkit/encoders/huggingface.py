"""Any text encoder of the transformers library as a text tower (extra `huggingface`)."""

import json
import textwrap
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clipkit.encoders.base import LayerGroup, TextEncoder
from clipkit.errors import UserError
from clipkit.ranges import check_choice
from clipkit.tokenizer import TextContract

KEY = "model.text_encoder"
HuggingFacePooling = Literal["mean", "first", "last", "end", "max"]


class HuggingFaceTextEncoder(TextEncoder):
    """A BERT, RoBERTa, T5 encoder, ... of transformers, tokens (B, L) to features (B, feature_dim).

    Padding is masked, and poolings are over real tokens only.

    Args:
        contract: what the model's own tokenizer says of its tokens.
        name: a hub id or a local folder; with `config` only a label.
        pretrained: with weights; otherwise `name` gives the configuration, and weights are drawn.
        pooling: `end` is the first end token, `last` the last token that is not padding.
        config: the configuration itself (`model_type` and what differs from its defaults), so that
            nothing is read; vocabulary size and special ids are the contract's unless given.
        gradient_checkpointing: keep the inputs of the blocks alone, and run each again for its
            gradient.

    Raises:
        UserError: transformers is missing, the model cannot be had, or the contract does not fit.
    """

    def __init__(
        self,
        contract: TextContract,
        *,
        name: str,
        pretrained: bool = True,
        pooling: HuggingFacePooling = "mean",
        config: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        transformers = _import_transformers()
        check_choice(f"{KEY}.pooling", pooling, get_args(HuggingFacePooling))
        if config is not None and pretrained:
            raise UserError(
                f"{KEY}.pretrained: true does not go with {KEY}.config, which has no weights, "
                "accepted is false"
            )
        model = (
            _pretrained_model(transformers, name)
            if pretrained
            else _drawn_model(transformers, _configuration(transformers, name, config, contract))
        )
        # BERT's pooler is a leftover of next-sentence prediction: without a gradient it breaks DDP.
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        _refuse_misfit(model, contract)
        probe = _probe(model, contract, pooling)
        super().__init__(feature_dim=probe.shape[-1])
        # Nearly always true; convolutions over tokens (ConvBERT) and Fourier mixing (FNet) see it.
        self.trim_is_exact = torch.allclose(probe[0], probe[1], rtol=1e-3, atol=1e-4)
        self.pooling = pooling
        self.end_id = contract.end_id
        self.pad_id = contract.pad_id
        self.model = model
        if gradient_checkpointing:
            _checkpoint_blocks(model)

    def forward(self, tokens: Tensor) -> Tensor:
        return _features(self.model, tokens, self.pooling, end_id=self.end_id, pad_id=self.pad_id)

    def layer_groups(self) -> list[LayerGroup]:
        modules = dict(self.model.named_modules())
        lists = {name: part for name, part in modules.items() if isinstance(part, nn.ModuleList)}
        if not lists:
            return [[self]]
        name = max(lists, key=lambda name: len(lists[name]))  # the outermost of the longest
        below: list[nn.Module | nn.Parameter] = []
        above: list[nn.Module | nn.Parameter] = []
        passed_blocks = False
        for parameter_name, parameter in self.model.named_parameters():
            if parameter_name.startswith(f"{name}."):
                passed_blocks = True
            elif passed_blocks and "norm" in parameter_name and "embed" not in parameter_name:
                above.append(parameter)
            else:  # embeddings, and what all blocks share, such as MPNet's relative positions
                below.append(parameter)
        groups: list[LayerGroup] = [below]
        groups.extend([block] for block in lists[name])
        return [*groups[:-1], [*groups[-1], *above]]

    def no_weight_decay(self) -> set[str]:
        tables = ("position", "token_type_embedding", "relative_attention_bias", "wpe.")
        return {
            name for name, _ in self.named_parameters() if any(table in name for table in tables)
        }

    def carried(self) -> dict[str, object]:
        # Through JSON: a checkpoint carries plain values only.
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        return {"pretrained": False, "config": config}


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{KEY}: HuggingFaceTextEncoder needs the library transformers, "
            "pip install 'clipkit[huggingface]' brings it"
        ) from None
    return transformers


def _pretrained_model(transformers: ModuleType, name: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model, loading = _auto_class(transformers, config).from_pretrained(
            name, config=config, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise UserError(
            f"{KEY}.name: {name} could not be had ({_first_line(error)}), accepted are a hub id "
            f"with a network, a local folder, or {KEY}.config with {KEY}.pretrained: false"
        ) from error
    missing = [key for key in loading["missing_keys"] if "pooler" not in key]
    if missing:
        raise UserError(
            f"{KEY}.name: {name} lacks {len(missing)} of the model's tensors, such as {missing[0]}"
        )
    return _encoder_only(model.float())


def _configuration(
    transformers: ModuleType, name: str, config: dict[str, Any] | None, contract: TextContract
) -> Any:
    try:
        if config is None:
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        given = {**_special_ids(contract), "vocab_size": contract.vocab_size, **config}
        return transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    except KeyError:
        raise UserError(
            f"{KEY}.config: model_type is missing, accepted are transformers' names such as bert"
        ) from None
    except Exception as error:
        key = f"{KEY}.name: {name}" if config is None else f"{KEY}.config"
        raise UserError(f"{key} gives no configuration ({_first_line(error)})") from error


def _special_ids(contract: TextContract) -> dict[str, int | None]:
    ids = {"bos_token_id": contract.start_id, "eos_token_id": contract.end_id}
    # The row of the padding id is never trained: it must not be the end token's.
    return ids if contract.pad_id == contract.end_id else {**ids, "pad_token_id": contract.pad_id}


def _drawn_model(transformers: ModuleType, config: Any) -> Any:
    try:
        model = _auto_class(transformers, config).from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{KEY}.config: {config.model_type} cannot be built ({_first_line(error)})"
        ) from error
    return _encoder_only(model.float())


def _auto_class(transformers: ModuleType, config: Any) -> Any:
    # Of T5 and its kin this is the encoder alone; it does not list every model.
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _encoder_only(model: Any) -> Any:
    if model.config.is_encoder_decoder and hasattr(model, "decoder"):
        return model.get_encoder()
    return model


def _refuse_misfit(model: Any, contract: TextContract) -> None:
    try:
        rows = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        raise UserError(
            f"{KEY}: {model.config.model_type} is not an encoder of token ids"
        ) from None
    if contract.vocab_size > rows:
        raise UserError(
            f"tokenizer: its {contract.vocab_size} tokens do not fit the {rows} rows of the "
            f"embedding table of {KEY}, accepted is the model's own tokenizer"
        )
    for name, table in model.named_modules():
        if not (name.endswith("position_embeddings") and isinstance(table, nn.Embedding)):
            continue
        # RoBERTa counts positions from the padding id on, and knows padding by its own id.
        offset = 0 if table.padding_idx is None else table.padding_idx + 1
        if contract.context_length > table.num_embeddings - offset:
            raise UserError(
                f"tokenizer.context_length: {contract.context_length} is more than the "
                f"{table.num_embeddings - offset} positions of {KEY}, accepted are up to as many"
            )
        if table.padding_idx is not None and table.padding_idx != contract.pad_id:
            raise UserError(
                f"tokenizer: its padding id {contract.pad_id} is not the padding id "
                f"{table.padding_idx} of {KEY}, accepted is the model's own tokenizer"
            )


def _probe(model: Any, contract: TextContract, pooling: HuggingFacePooling) -> Tensor:
    """The features of one short caption with and without padding, (2, feature_dim)."""
    words = [
        token
        for token in range(contract.vocab_size)
        if token not in (contract.end_id, contract.pad_id)
    ]
    start = words[:1] if contract.start_id is None else [contract.start_id]
    caption = torch.tensor([[*start, *words[-3:], contract.end_id][-contract.context_length :]])
    padding = torch.full((1, contract.context_length - caption.shape[1]), contract.pad_id)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = [
                _features(model, tokens, pooling, end_id=contract.end_id, pad_id=contract.pad_id)
                for tokens in (caption, torch.cat([caption, padding], dim=1))
            ]
    except Exception as error:
        raise UserError(
            f"{KEY}: {model.config.model_type} cannot encode token ids ({_first_line(error)})"
        ) from error
    finally:
        model.train(training)
    return torch.cat(features)


def _checkpoint_blocks(model: Any) -> None:
    new_name = "activation_checkpointing_enable"  # transformers 5
    enable = getattr(model, new_name, model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"{KEY}.gradient_checkpointing: {model.config.model_type} does not have it, "
            "accepted is false"
        ) from error
    # For reentrant checkpoints; here it would pass gradients through a locked tower.
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()


def _features(
    model: Any, tokens: Tensor, pooling: HuggingFacePooling, *, end_id: int, pad_id: int
) -> Tensor:
    lengths = _lengths(tokens, end_id=end_id, pad_id=pad_id)  # (B,)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    real = places < lengths[:, None]  # (B, L)
    hidden: Tensor = model(
        input_ids=tokens, attention_mask=real.long()
    ).last_hidden_state  # (B, L, feature_dim)
    if pooling == "mean":
        weights = real.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    if pooling == "max":
        return hidden.masked_fill(~real.unsqueeze(-1), float("-inf")).amax(dim=1)
    if pooling == "first":
        return hidden[:, 0]
    last = lengths - 1
    if pooling == "end":
        is_end = tokens == end_id
        last = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), last)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _lengths(tokens: Tensor, *, end_id: int, pad_id: int) -> Tensor:
    """How many tokens stand before the run of padding that closes each caption.

    The padding id may occur inside a caption (open_clip pads with "!"), and may be the end id
    (transformers' CLIP): then the first of the closing run is the end token.
    """
    trailing = (tokens == pad_id).flip(1).int().cumprod(dim=1).sum(dim=1)
    lengths = tokens.shape[1] - trailing
    if pad_id == end_id:
        lengths = (lengths + 1).clamp(max=tokens.shape[1])
    return lengths.clamp(min=1)


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return textwrap.shorten(line, 200, placeholder=" ...")
