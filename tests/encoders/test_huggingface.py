import copy
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch.nn import functional as F

from clipkit.encoders import HuggingFaceTextEncoder
from clipkit.encoders.huggingface import HuggingFacePooling
from clipkit.encoders.locking import lock
from clipkit.errors import UserError
from clipkit.tokenizer import TextContract

transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
ROWS = {"max_position_embeddings": 12}
ROBERTA_ROWS = {"max_position_embeddings": 14}  # counted from the padding id on: 12 are left
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**BERT, **ROWS},
    "roberta": {**BERT, **ROBERTA_ROWS},
    "xlm-roberta": {**BERT, **ROBERTA_ROWS},
    "mpnet": {**BERT, **ROBERTA_ROWS},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, **ROWS},
    "modernbert": {**BERT, "local_attention": 4, "cls_token_id": 2, "sep_token_id": 3},
    "t5": {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 8},
}
TOKENS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 3, 1, 1], [2, 1, 8, 3, 1]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def contract(**changes: int) -> TextContract:
    values = {"vocab_size": 40, "context_length": 12, "start_id": 2, "end_id": 3, "pad_id": 1}
    return TextContract(**{**values, **changes}, pad_to_context=False, clean="whitespace")


def build(
    model_type: str, pooling: HuggingFacePooling = "mean", **changes: Any
) -> HuggingFaceTextEncoder:
    torch.manual_seed(0)
    config = {"model_type": model_type, **CONFIGS[model_type], **changes}
    return HuggingFaceTextEncoder(
        contract(), name=model_type, pretrained=False, pooling=pooling, config=config
    )


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_family_encodes_learns_ignores_padding_and_is_carried(model_type: str) -> None:
    encoder = build(model_type)
    assert (encoder.feature_dim, encoder.trim_is_exact) == (16, True)
    (encoder(TOKENS) ** 3).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert encoder.no_weight_decay() <= dict(encoder.named_parameters()).keys()

    encoder.eval()
    full = F.pad(TOKENS, (0, 7), value=1)
    torch.testing.assert_close(encoder(full), encoder(TOKENS), rtol=0, atol=1e-5)

    carried = json.loads(json.dumps(encoder.carried()))
    rebuilt = HuggingFaceTextEncoder(contract(), name="gone", **carried)
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt.eval()(TOKENS), encoder(TOKENS))

    assert len(encoder.layer_groups()) == 3  # embeddings and two blocks
    lock(encoder, 1)
    open_names = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert open_names
    assert not any("embed" in name for name in open_names)
    exact = encoder.double()
    torch.testing.assert_close(exact(full), exact(TOKENS), rtol=0, atol=1e-12)


def test_features_are_those_of_the_library() -> None:
    encoder = build("bert").eval()
    model = copy.deepcopy(encoder.model)
    places = {"first": [0, 0, 0], "last": [4, 2, 3], "end": [4, 2, 3]}
    for row, length in enumerate([5, 3, 4]):
        hidden = model(input_ids=TOKENS[row : row + 1, :length]).last_hidden_state[0]
        expected = {
            "mean": hidden.mean(dim=0),
            "max": hidden.amax(dim=0),
            **{pooling: hidden[place[row]] for pooling, place in places.items()},
        }
        for pooling, value in expected.items():
            encoder.pooling = pooling
            torch.testing.assert_close(encoder(TOKENS)[row], value)


def test_a_tower_whose_padding_id_is_its_end_id() -> None:
    encoder = build("bert").eval()
    encoder.pad_id = encoder.end_id
    doubled = torch.tensor([[2, 9, 3, 3, 3]])
    torch.testing.assert_close(encoder(doubled), encoder(doubled[:, :3]))


def test_towers_that_see_their_padding_say_so() -> None:
    encoder = HuggingFaceTextEncoder(
        contract(),
        name="fnet",
        pretrained=False,
        config={"model_type": "fnet", **BERT, **ROWS},
    )
    assert not encoder.trim_is_exact


def test_a_local_folder_with_and_without_its_weights(tmp_path: Path) -> None:
    source = build("roberta")
    transformers.AutoModelForMaskedLM.from_config(source.model.config).save_pretrained(tmp_path)
    loaded = HuggingFaceTextEncoder(contract(), name=str(tmp_path))
    again = HuggingFaceTextEncoder(contract(), name=str(tmp_path))
    assert torch.equal(loaded.eval()(TOKENS), again.eval()(TOKENS))
    drawn = HuggingFaceTextEncoder(contract(), name=str(tmp_path), pretrained=False)
    assert drawn.feature_dim == 16
    assert not torch.equal(drawn.eval()(TOKENS), loaded(TOKENS))
    assert loaded.carried()["pretrained"] is False


def test_a_folder_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    model = build("bert").model
    tensors = {name: t for name, t in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(
        UserError, match=r"lacks 16 of the model's tensors, such as encoder\.layer\.1"
    ):
        HuggingFaceTextEncoder(contract(), name=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"vocab_size": 41}, {}, r"its 41 tokens do not fit the 40 rows"),
        ({"context_length": 13}, {}, r"context_length: 13 is more than the 12 positions"),
        ({"pad_id": 4}, {}, r"padding id 4 is not the padding id 1"),
        ({}, {"pretrained": True}, r"pretrained: true does not go with .*config"),
        ({}, {"config": {"hidden_size": 4}}, r"config: model_type is missing"),
        ({}, {"config": {"model_type": "bart5"}}, r"config gives no configuration"),
        ({}, {"config": {"model_type": "vit"}}, r"vit is not an encoder of token ids"),
        ({}, {"config": None, "pretrained": True}, r"name: absent could not be had .*config"),
        ({}, {"config": None}, r"name: absent gives no configuration"),
        ({}, {"pooling": "cls"}, r"pooling: cls .* mean or first or last or end or max"),
    ],
)
def test_mistakes_end_in_one_sentence(
    changes: dict[str, int], arguments: dict[str, Any], sentence: str
) -> None:
    config = {
        "model_type": "roberta",
        "vocab_size": 40,
        "pad_token_id": 1,
        **CONFIGS["roberta"],
    }
    defaults = {"name": "absent", "pretrained": False, "config": config}
    with pytest.raises(UserError, match=sentence) as caught:
        HuggingFaceTextEncoder(contract(**changes), **{**defaults, **arguments})
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'clipkit\[huggingface\]'"):
        HuggingFaceTextEncoder(contract(), name="bert-base-uncased")
