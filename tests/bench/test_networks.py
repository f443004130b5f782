"""The ViT against transformers' own, heads, and filling networks from checkpoints."""

import json

import pytest
import torch
from torch.nn import functional as F

from eutectic.bench.backbones import backbone
from eutectic.bench.heads import few_shot, prototype_head
from eutectic.bench.vit import ViT
from eutectic.checkpoint.base import Memory, live
from eutectic.checkpoint.folder import open_folder
from eutectic.errors import CheckpointError, LayoutError, TaskError
from eutectic.fusion._folder import filled

CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 42,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}


def reference(**changes):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**CONFIG | changes)).eval()
    for parameter in model.parameters():  # its own initialisation is too small to tell layers apart
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


@pytest.mark.parametrize(("image_size", "pixels"), [(42, 42), (56, 42), (28, 70)])
@torch.no_grad()
def test_vit_equals_transformers_dinov2_also_at_other_resolutions(image_size, pixels, tmp_path):
    theirs = reference(image_size=image_size)
    theirs.save_pretrained(tmp_path)  # in memory transformers has other names than in a folder
    images = torch.randn(2, 3, pixels, pixels)
    expected = theirs(images).last_hidden_state
    for pooling, features in (("cls", expected[:, 0]), ("mean", expected[:, 1:].mean(1))):
        ours = ViT(CONFIG | {"image_size": image_size}, pooling).eval()
        filled(ours, open_folder(tmp_path))
        torch.testing.assert_close(ours(images), features, rtol=1e-4, atol=1e-4)


def test_fill_refuses_other_layouts_and_backbone_other_configs(tmp_path):
    network = ViT(CONFIG)
    state = network.state_dict()
    name = "encoder.layer.0.mlp.fc1.bias"
    with pytest.raises(LayoutError, match=name):
        filled(network, Memory({key: value for key, value in state.items() if key != name}))
    config = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config\.json"):
        backbone(config, live(network), "cls")
    config.write_text(json.dumps(CONFIG | {"model_type": "resnet"}))
    with pytest.raises(CheckpointError, match="'resnet' is none of dinov2, bert"):
        backbone(config, live(network), "cls")


def test_mean_pooled_bert_ignores_padding_and_batch_mates(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    weights = BertModel(config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    network = backbone(tmp_path / "config.json", live(weights), "mean")
    ids = torch.tensor([[3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 0]])
    with torch.no_grad():
        both, alone = network(ids), network(ids[:1, :3])
        expected = weights.eval()(input_ids=ids[:1, :3]).last_hidden_state.mean(1)
    torch.testing.assert_close(both[:1], alone)
    torch.testing.assert_close(alone, expected)
    assert set(network.state_dict()) == set(weights.state_dict())


def test_prototypes_are_class_means_of_standardised_directions():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(5)
    centres = torch.randn(4, 8, generator=generator) * 5
    features = centres[labels] + torch.randn(20, 8, generator=generator)
    head = prototype_head(features, labels, 4, scale=20.0)
    assert (head(features).argmax(1) == labels).all()
    z = F.normalize((features - features.mean(0)) / features.std(0), dim=1)
    expected = F.normalize(torch.stack([z[labels == c].mean(0) for c in range(4)]), dim=1)
    torch.testing.assert_close(head(features), 20 * z @ expected.T)
    assert not list(head.parameters())
    with pytest.raises(TaskError, match="class 4 of 5"):
        prototype_head(features, labels, 5, 20.0)


def test_few_shot_takes_so_many_of_each_class_and_all_of_a_rare_one():
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 9)
    index = few_shot(labels, 3, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[index]).tolist() == [3, 2, 3]
    assert len(set(index.tolist())) == 8
