"""Small networks with all that makes weights awkward, their experts and tasks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from eutectic.checkpoint.base import Memory
from eutectic.task import Arrays, Task

WIDTH, VOCABULARY, LENGTH = 16, 23, 6
TRANSFORMERS = ("vit", "dinov2", "clip", "bert", "gpt2", "t5", "llama")


class Awkward(nn.Module):
    """An MLP with a BatchNorm, a weight used twice, a frozen weight, a non-contiguous one and buffers."""

    def __init__(self, width=5):
        super().__init__()
        self.first, self.twin = nn.Linear(4, width), nn.Linear(width, width)
        self.again, self.frozen = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.again.weight = self.twin.weight
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(width)
        self.turned = nn.Parameter(torch.randn(3, width).T)
        self.register_buffer("positions", torch.arange(3))
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x):
        hidden = self.norm(self.again(torch.tanh(self.twin(torch.tanh(self.first(x))))))
        return (torch.tanh(self.frozen(hidden)) + self.shift) @ self.turned


class Features(nn.Module):
    """A network of transformers, and what of its output are the features."""

    def __init__(self, model, pick):
        super().__init__()
        self.model, self._pick = model, pick

    def forward(self, x):
        return self._pick(self.model, x)


def transformer(kind):
    """A tiny network of a real architecture, with random weights, and the width of its features."""
    import transformers as T

    vision = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}

    def pooled(model, x):
        return model(x).last_hidden_state.mean(1)

    def logits(model, x):
        return model(x).logits.mean(1)

    match kind:
        case "vit":
            return Features(T.ViTModel(T.ViTConfig(**vision, intermediate_size=24)), pooled), WIDTH
        case "dinov2":
            return Features(T.Dinov2Model(T.Dinov2Config(**vision, mlp_ratio=2)), pooled), WIDTH
        case "clip":
            return Features(T.CLIPVisionModel(T.CLIPVisionConfig(**vision, intermediate_size=24)), pooled), WIDTH
        case "bert":
            return Features(T.BertModel(T.BertConfig(**text, intermediate_size=24)), pooled), WIDTH
        case "gpt2":
            config = T.GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2)
            return Features(T.GPT2LMHeadModel(config), logits), VOCABULARY
        case "t5":
            config = T.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
            model = T.T5ForConditionalGeneration(config)
            return Features(model, lambda model, x: model(x, decoder_input_ids=x.flip(1)).logits.mean(1)), VOCABULARY
        case "llama":
            config = T.LlamaConfig(**text, num_key_value_heads=1, intermediate_size=24)
            return Features(T.LlamaForCausalLM(config), logits), VOCABULARY
    raise ValueError(kind)


def network_of(kind, dtype=torch.float64, seed=0):
    """A network in evaluation mode with weights large enough to tell layers apart, and the width of its features."""
    torch.manual_seed(seed)
    network, width = (Awkward(), 3) if kind == "awkward" else transformer(kind)
    network = network.to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network, width


def experts_of(network, names=("a", "b"), noise=0.1):
    """Fine-tunes: the network's floating-point tensors with noise, tied ones with the same."""
    found = {}
    for number, name in enumerate(names):
        random, moved = torch.Generator().manual_seed(100 + number), {}
        for tensor in network.state_dict(keep_vars=True).values():
            if tensor.dtype.is_floating_point and id(tensor) not in moved:
                change = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
                moved[id(tensor)] = (tensor + noise * change).detach().to(tensor.dtype)
        state = network.state_dict(keep_vars=True)
        found[name] = Memory(
            {key: moved.get(id(tensor), tensor).detach().clone() for key, tensor in state.items()}, f"<{name}>"
        )
    return found


def base_of(network):
    return Memory({name: tensor.clone() for name, tensor in network.state_dict().items()}, "<base>")


def inputs_of(kind, n, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    if kind == "awkward":
        return torch.randn(n, 4, generator=random, dtype=torch.float64).to(dtype)
    if kind in ("vit", "dinov2", "clip"):
        return torch.randn(n, 3, 8, 8, generator=random, dtype=torch.float64).to(dtype)
    return torch.randint(1, VOCABULARY, (n, LENGTH), generator=random)


def head_of(width, classes, seed=0, dtype=torch.float64):
    weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return lambda features: F.linear(features, weight)


def tasks_of(kind, width, names=("a", "b"), n=24, dtype=torch.float64):
    """Two kinds of classes, unlabelled but for zeros."""
    found = []
    for number, name in enumerate(names):
        splits = {
            split: Arrays(inputs_of(kind, n, seed=10 * number + place, dtype=dtype), torch.zeros(n, dtype=torch.long))
            for place, split in enumerate(("adapt", "test", "val"))
        }
        found.append(Task(name, head_of(width, 3 + number, seed=number, dtype=dtype), **splits))
    return found
