"""Two-layer models so small that a test can save them at every kill, and what they compute."""

from support.models import attached, tokens

import koff

IDS = tokens(2, 5)


def small(names, seed, sparsity):
    """A compacted model with these memories."""
    model = attached(
        "llama",
        changes=dict(num_hidden_layers=2, hidden_size=16, intermediate_size=24),
        memories=names,
        seed=seed,
        target_sparsity=sparsity,
        lora=koff.LoRAConfig(r=2, target_modules=("q_proj", "down_proj")),
        kv=koff.KVConfig(num_tokens=2, init="tokens"),
    )
    koff.binarize(model, multiple_of=1)
    return koff.compact(model, inplace=True)


def outputs(model):
    """Logits with every memory and with none."""
    memories = (None, *model.koff.memory_names)
    return {memory: model(IDS, memory=memory).logits for memory in memories}
