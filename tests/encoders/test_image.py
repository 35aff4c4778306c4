from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from clipkit.encoders import TimmImageEncoder
from clipkit.errors import UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def pictures(size: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def features(encoder: TimmImageEncoder, size: int | None = None) -> Tensor:
    with torch.no_grad():
        return encoder.eval()(pictures(size or encoder.image_size))


@pytest.mark.parametrize(
    ("name", "width", "size", "interpolation"),
    [
        ("test_vit", 64, 160, "bicubic"),
        ("test_resnet", 96, 160, "bilinear"),
        ("resnet10t", 512, 176, "bicubic"),
        ("test_convnext", 64, 160, "bicubic"),
    ],
)
def test_model_brings_its_own_statistics_and_every_parameter_learns(
    name: str, width: int, size: int, interpolation: str
) -> None:
    encoder = TimmImageEncoder(name)
    config = timm.get_pretrained_cfg(name)
    assert (encoder.feature_dim, encoder.image_size) == (width, size)
    assert (encoder.interpolation, encoder.resize_mode) == (interpolation, "shortest")
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(config.mean))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor(config.std))

    images = pictures(size)
    expected = encoder.trunk.eval()((images - encoder.mean) / encoder.std)
    torch.testing.assert_close(encoder.eval()(images), expected)

    encoder.train()(images).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "resize_mode"),
    [("vit_base_patch16_siglip_224", "squash"), ("vit_base_patch32_clip_224", "shortest")],
)
def test_siglip_squashes_and_clip_crops(name: str, resize_mode: str) -> None:
    with torch.device("meta"):
        encoder = TimmImageEncoder(name)
    assert (encoder.resize_mode, encoder.interpolation) == (resize_mode, "bicubic")


def test_arguments_win_over_the_model() -> None:
    encoder = TimmImageEncoder(
        "test_resnet",
        image_size=96,
        mean=[0.0, 0.1, 0.2],
        std=[1.0, 2.0, 3.0],
        interpolation="bicubic",
        resize_mode="squash",
    )
    assert encoder.mean.flatten().tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert encoder.std.flatten().tolist() == [1.0, 2.0, 3.0]
    assert (encoder.interpolation, encoder.resize_mode) == ("bicubic", "squash")
    assert features(encoder).shape == (2, 96)


def test_any_size_that_the_model_can_take() -> None:
    vit = TimmImageEncoder("test_vit", image_size=64)
    assert vit.trunk.pos_embed.shape[1] == 4 * 4 + 1
    assert features(vit).shape == (2, 64)
    assert features(TimmImageEncoder("test_resnet", image_size=70), 70).shape == (2, 96)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "test_vt"}, r"image_encoder\.name: test_vt .* did you mean test_vit"),
        ({"name": "test_vit.gold"}, r"name: test_vit\.gold .* accepted tags: r160_in1k"),
        ({"name": "test_vit", "image_size": 70}, r"image_size: test_vit .* 70, .* multiples of 16"),
        ({"name": "test_vit", "image_size": 0}, r"image_size: 0 .* from 1 to 8,192"),
        (
            {"name": "test_resnet", "patch_drop_ratio": 0.5},
            r"patch_drop_ratio: test_resnet .* is 0",
        ),
        ({"name": "test_vit", "drop_path_ratio": 1.5}, r"drop_path_ratio: 1\.5 .* 0 to below 1"),
        ({"name": "test_vit", "mean": [0.5]}, r"mean: \[0\.5\] .* three numbers"),
        ({"name": "test_vit", "std": [0.5, 0.5, 0.0]}, r"std: .* three numbers above 0"),
        ({"name": "test_vit", "pretrained": True}, r"pretrained: the weights of test_vit .* false"),
        ({"name": "test_vit", "pretrained": True, "weights": "a.pt"}, r"exclude each other"),
        ({"name": "test_vit", "weights": "absent.pt"}, r"weights: absent\.pt is not a file"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        TimmImageEncoder(**arguments)
    assert "\n" not in str(caught.value)


def open_clip_file(trunk_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What open_clip saves of a model with a timm tower: trunk, head, and the other tower."""
    return {
        **{f"visual.trunk.{name}": tensor for name, tensor in trunk_tensors.items()},
        "visual.head.proj.weight": torch.zeros(8, 64),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(4),
        "logit_scale": torch.zeros(()),
    }


@pytest.mark.parametrize("form", ["timm.safetensors", "open_clip.pt", "lightning.pth"])
def test_weights_from_a_local_file(form: str, tmp_path: Path) -> None:
    model = timm.create_model("test_vit")  # with its classifier, as published
    tensors = dict(model.state_dict())
    path = tmp_path / form
    if form == "timm.safetensors":
        safetensors.torch.save_file(tensors, path)
    elif form == "open_clip.pt":
        torch.save({"epoch": 3, "state_dict": open_clip_file(tensors)}, path)
    else:
        torch.save(
            {"state_dict": {f"image_encoder.trunk.{k}": v for k, v in tensors.items()}}, path
        )
    encoder = TimmImageEncoder("test_vit", weights=str(path))
    images = pictures(160)
    with torch.no_grad():
        expected = model.eval().forward_head(
            model.forward_features((images - encoder.mean) / encoder.std), pre_logits=True
        )
    torch.testing.assert_close(features(encoder), expected)


def test_position_tables_follow_the_size_of_the_pictures(tmp_path: Path) -> None:
    tensors = dict(timm.create_model("test_vit", num_classes=0).state_dict())
    tensors["pos_embed"] = torch.randn(1, 101, 64)
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    encoder = TimmImageEncoder("test_vit", image_size=64, weights=str(path))
    expected = resample_abs_pos_embed(tensors["pos_embed"], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.trunk.pos_embed.data, expected)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tensors = dict(timm.create_model("test_vit", num_classes=0).state_dict())
    del tensors["norm.weight"]
    tensors["surprise.weight"] = torch.zeros(1)
    tensors["blocks.0.norm1.bias"] = torch.zeros(3)
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    with pytest.raises(UserError, match="does not fit") as caught:
        TimmImageEncoder("test_vit", weights=str(path))
    assert "norm.weight missing; surprise.weight unexpected" in str(caught.value)
    assert "blocks.0.norm1.bias of another shape" in str(caught.value)


def test_a_file_of_anything_but_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": Path("x")}, path)  # a pickled object, which weights_only refuses to build
    with pytest.raises(UserError, match="is not a file of tensors"):
        TimmImageEncoder("test_vit", weights=str(path))
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="holds no tensors by name"):
        TimmImageEncoder("test_vit", weights=str(path))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_weights_of_another_family_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    with pytest.raises(UserError, match=r"weights\.pt does not fit the model: .* missing; .*"):
        TimmImageEncoder(name, weights=str(path))


def test_what_is_carried_rebuilds_the_encoder_without_its_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    arguments = {"name": "test_vit", "image_size": 64, "weights": str(path), "std": [1.0, 2.0, 3.0]}
    encoder = TimmImageEncoder(**arguments)
    path.unlink()
    rebuilt = TimmImageEncoder(**{**arguments, **encoder.carried()})
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(features(rebuilt), features(encoder))
    assert rebuilt.carried() == encoder.carried()


def test_drops_are_for_training_only() -> None:
    encoder = TimmImageEncoder("test_vit", image_size=64, patch_drop_ratio=0.5, drop_path_ratio=0.5)
    torch.testing.assert_close(features(encoder), features(encoder))
    encoder.train()
    assert not torch.equal(encoder(pictures(64)), encoder(pictures(64)))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("test_vit", 1),  # a class token
        ("test_vit2", 0),  # registers, pooled by averages
        ("test_vit4", 0),
        ("vit_base_patch16_siglip_224", 0),  # no prefix token, pooled by attention
    ],
)
def test_patches_are_dropped_and_prefix_tokens_are_not(name: str, count: int) -> None:
    with torch.device("meta"):
        encoder = TimmImageEncoder(name, image_size=64, patch_drop_ratio=0.75)
        trunk = encoder.train().trunk
        seen: list[int] = []
        trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        assert encoder(torch.empty(2, 3, 64, 64)).shape == (2, encoder.feature_dim)
        encoder.eval()(torch.empty(2, 3, 64, 64))
    patches = (64 // trunk.patch_embed.patch_size[0]) ** 2
    assert (trunk.cls_token is not None) == bool(count)
    assert seen == [patches // 4 + trunk.num_prefix_tokens, patches + trunk.num_prefix_tokens]


def test_patch_dropout_is_nothing_in_evaluation() -> None:
    torch.manual_seed(0)
    plain = TimmImageEncoder("test_vit", image_size=64)
    dropping = TimmImageEncoder("test_vit", image_size=64, patch_drop_ratio=0.5)
    dropping.load_state_dict(plain.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(features(dropping), features(plain))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_conv_nets_run_in_channels_last(name: str) -> None:
    torch.manual_seed(0)
    encoder = TimmImageEncoder(name, image_size=64).double()
    plain = timm.create_model(name, num_classes=0).double()
    plain.load_state_dict(encoder.trunk.state_dict())
    assert all(p.is_contiguous() for p in plain.parameters())
    strides: list[bool] = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: strides.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    images = pictures(64, 3).double()
    encoder.train()(images).pow(3).sum().backward()
    plain.train()((images - encoder.mean) / encoder.std).pow(3).sum().backward()
    assert all(strides)
    expected = dict(plain.named_parameters())
    for name_of, parameter in encoder.trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name_of].grad, rtol=1e-9, atol=1e-9)
    before = encoder.state_dict()
    encoder.trunk.load_state_dict(plain.state_dict())  # a checkpoint from before
    assert before.keys() == encoder.state_dict().keys()
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    channels_last = torch.channels_last
    assert all(m.weight.is_contiguous(memory_format=channels_last) for m in convolutions)


def test_a_vit_is_left_as_it_is() -> None:
    encoder = TimmImageEncoder("test_vit", image_size=64)
    assert encoder.trunk.patch_embed.proj.weight.is_contiguous()


def test_position_tables_never_decay() -> None:
    vit = TimmImageEncoder("test_vit", image_size=64)
    assert vit.no_weight_decay() == {"trunk.cls_token", "trunk.pos_embed"}
    assert vit.no_weight_decay() <= dict(vit.named_parameters()).keys()
    with torch.device("meta"):
        assert TimmImageEncoder("resnet50_clip").no_weight_decay() == {"trunk.head.pos_embed"}
