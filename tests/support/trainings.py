"""Short trainings of tiny models on documents of token ids."""

import torch
from support.models import NAMES, VOCAB, attached, tiny

import koff

WORDS = 40  # of a document
STEPS = 3  # of tiny_run
BLOCK = 16  # tokens of a row
LORA = koff.LoRAConfig(r=4, target_modules="all-linear")


def documents(seed: int, count: int = 12):
    """Token ids of a domain: each follows a fixed random successor most of the time."""
    generator = torch.Generator().manual_seed(seed)
    successor = torch.randperm(VOCAB - 3, generator=generator) + 3
    docs = []
    for _ in range(count):
        ids = [int(torch.randint(3, VOCAB, (), generator=generator))]
        for _ in range(WORDS):
            jump = torch.rand((), generator=generator) < 0.1
            last = int(torch.randint(3, VOCAB, (), generator=generator)) if jump else ids[-1]
            ids.append(int(successor[last - 3]))
        docs.append({"input_ids": ids})
    return docs


DOMAINS = {name: documents(i) for i, name in enumerate(NAMES)}
GENERAL = {"math": documents(7), "en": documents(8)}


def answers(seed):
    """Records of 15 to 16 tokens, so that each fills a block, of which the last 4 to 10 count."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for document in documents(seed):
        given, short = (int(torch.randint(*r, (), generator=generator)) for r in ((6, 11), (0, 2)))
        ids = document["input_ids"][: BLOCK - short]
        records.append({"input_ids": ids, "labels": [-100] * given + ids[given:]})
    return records


ANSWERS = {name: answers(i) for i, name in enumerate(NAMES)}


def arguments(folder, **changes):
    """Arguments of a run of twelve steps on the CPU."""
    values = dict(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        block_size=BLOCK,
        logging_steps=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        kv_learning_rate=1e-2,
        lora_learning_rate=1e-2,
        width_multiple_of=1,
    )
    return koff.KoffTrainingArguments(**{**values, **changes})


def fresh(initializer_range=0.3, **config):
    """A tiny Llama with koff attached, untrained."""
    config = {"kv": koff.KVConfig(5, "text"), "lora": LORA, **config}
    # Large initial weights: with the usual 0.02 the frozen head could not tell tokens apart.
    base = tiny("llama", initializer_range=initializer_range, max_position_embeddings=1024)
    return koff.attach(base, koff.KoffConfig(**{"memories": NAMES, **config}))


def trainer(folder, model=None, domains=None, general=None, **changes):
    """A trainer of a fresh model, or of a given one, on DOMAINS and GENERAL."""
    return koff.KoffTrainer(
        fresh() if model is None else model,
        arguments(folder, **changes),
        train_datasets=DOMAINS if domains is None else domains,
        general_datasets=GENERAL if general is None else general or None,
    )


def learned(model):
    """Copies of all that koff learns, by name."""
    return {name: t.clone() for name, t in model.koff.state_dict().items()}


def tiny_run(folder, kind=koff.KoffTrainer, domains=None, general=None, **changes):
    """A trainer of one small layer for STEPS steps, with a checkpoint after each."""
    model = attached(
        "llama",
        shift=False,
        changes=dict(
            num_hidden_layers=1, hidden_size=16, intermediate_size=8, initializer_range=1.0
        ),
        memories=("en", "es"),
        lora=koff.LoRAConfig(r=2, target_modules=("q_proj",)),
        kv=koff.KVConfig(2, "normal"),
    )
    settings = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, fix_mask_at=0.5)
    settings |= dict(block_size=4, per_device_train_batch_size=2, general_every=0)
    args = arguments(folder, **{**settings, **changes})
    domains = domains or {name: DOMAINS[name] for name in ("en", "es")}
    return kind(model, args, train_datasets=domains, general_datasets=general)
