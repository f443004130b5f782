"""The report of a mixture's routing against coefficients that are known."""

from xml.etree import ElementTree

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, inputs_of, network_of

import eutectic as eu
from eutectic.bench.routing import heat_map, routing
from eutectic.errors import LayoutError
from eutectic.fusion._routing import gates
from eutectic.task import Task


def task(name, inputs):
    return Task(name, torch.nn.Identity(), test=(inputs, torch.zeros(len(inputs), dtype=torch.long)))


def test_coefficients_are_reported_by_task_and_layer_as_they_are():
    network, _ = network_of("vit")
    tasks = [task("a", inputs_of("vit", 5)), task("b", inputs_of("vit", 6, seed=3))]
    smile = eu.fuse("smile", network, experts_of(network), tasks=[], rank=2, gate_rank=2)
    found = routing(smile, tasks, batch_size=2)
    assert found.tasks == ["a", "b"]
    assert found.layers == list(gates(smile)) == list(smile.artefact.about["layers"])
    torch.testing.assert_close(found.mean.sum(-1), torch.ones(2, len(found.layers), dtype=torch.float64))
    first = gates(smile)[found.layers[0]]
    seen = []
    hook = first.register_forward_hook(lambda module, args, output: seen.append(module.choice(args[0])))
    with torch.no_grad():
        smile(inputs_of("vit", 5))
    hook.remove()
    torch.testing.assert_close(found.mean[0, 0], seen[0].flatten(0, -2).mean(0))
    assert ((found.entropy >= 0) & (found.entropy <= torch.tensor(2.0).log() + 1e-9)).all()
    assert not smile._forward_hooks


def test_wemoe_reports_its_blocks_and_the_map_is_an_image_of_them():
    network, _ = network_of("vit")
    inputs = inputs_of("vit", 8)
    tasks = [
        Task(
            name,
            torch.nn.Identity(),
            adapt=(inputs, torch.zeros(8, dtype=torch.long)),
            test=(inputs, torch.zeros(8, dtype=torch.long)),
        )
        for name in ("a", "b")
    ]
    mixture = eu.fuse("wemoe", network, experts_of(network), tasks=tasks, steps=1, batch_size=2, hidden=0)
    found = routing(mixture, tasks)
    assert found.mean.shape == (2, 2, 2)
    torch.testing.assert_close(found.mean, torch.full((2, 2, 2), 0.3).double(), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.entropy, torch.full((2, 2), 2.0).double().log(), rtol=0, atol=1e-4)
    image = ElementTree.fromstring(heat_map(found, ["<x>", "y"]))
    assert len([e for e in image if e.tag.endswith("rect")]) == 8
    assert "<x>" in image[1].text or any("<x>" in (e.text or "") for e in image.iter())
    assert found.to_json()["a"][found.layers[0]]["mean"] == pytest.approx([0.3, 0.3], abs=2e-3)


def test_a_plain_network_has_no_routing():
    network, _ = network_of("vit")
    assert base_of(network)
    with pytest.raises(LayoutError, match="no routed layers"):
        routing(network, [])
