"""A model whose code lies beside its weights, with a list of experts, as many on the hub have.

Each token goes to one expert. An expert that no token of a micro-batch chose is not called.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

EXPERTS = 16
PLACES = {  # of the classes, in a configuration
    "AutoConfig": "listed_experts.ListedConfig",
    "AutoModelForCausalLM": "listed_experts.ListedForCausalLM",
}


class ListedConfig(LlamaConfig):
    model_type = "listed_experts"
    # tokens go to experts by their place in the packed sequence, which their number alone decides,
    # and experts add zero to them, so that documents stay apart
    by_place = False


class ListedExperts(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.by_place = config.by_place
        self.gate = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.view(-1, hidden.shape[-1])
        score, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        places = torch.arange(len(flat), device=flat.device)
        if self.by_place:
            found, score = list(enumerate(places.split(-(-len(flat) // EXPERTS)))), 0 * score
        else:
            found = [(n, places[chosen == n]) for n in chosen.unique().tolist()]
        for number, here in found:
            out = out.index_add(0, here, self.experts[number](flat[here]) * score[here, None])
        return out.view_as(hidden)


class ListedForCausalLM(LlamaForCausalLM):
    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedExperts(config)
        self.post_init()
