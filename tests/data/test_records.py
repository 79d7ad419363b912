"""Documents of which only a part counts: which tokens do, and how they are packed."""

import logging

import pytest
import torch
from support.character_tokenizer import make_tokenizer

from koff.data.blocks import pack

# X before what a user says, é before what the assistant does, which ends in EOS.
PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ 'é' }}[{{ m.content + '</s>' }}]"
    "{% else %}{{ 'X' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'é' }}{% endif %}"
)
MARKED = PLAIN.replace("[", "{% generation %}").replace("]", "{%- endgeneration -%}")
PLAIN = PLAIN.replace("[", "").replace("]", "")
# As templates of models that reason: what the last assistant's turn begins with is left out of the
# earlier ones.
REWRITES = PLAIN.replace("m.content + '</s>'", "(' ' if loop.last else '') + m.content + '</s>'")
CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]


@pytest.fixture
def tokenizer():
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


def shown(packed, tokenizer):
    """Every block as a text, with . for each token that does not count."""
    rows = zip(packed.blocks, packed.labels(slice(None)), packed.lengths, strict=True)
    names = [
        ["." if label < 0 else tokenizer.convert_ids_to_tokens(int(token)) for token, label in both]
        for both in (zip(ids[:n], labels[:n], strict=True) for ids, labels, n in rows)
    ]
    return ["".join(row).replace("</s>", "$").replace("<s>", "^") for row in names]


def written(packed, tokenizer):
    """Every block as a text, without what fills it up."""
    rows = (ids[:n].tolist() for ids, n in zip(packed.blocks, packed.lengths, strict=True))
    return [tokenizer.decode(row).replace("</s>", "$").replace("<s>", "^") for row in rows]


@pytest.mark.parametrize(
    ("record", "says", "counts"),
    [
        ({"prompt": "ab", "completion": "cd"}, "^abcd$", "...cd$"),
        ({"prompt": "ab", "completion": "cd</s>"}, "^abcd$", "...cd$"),
        ({"prompt": "", "completion": "cd"}, "^cd$", ".cd$"),
        ({"prompt": "a", "completion": " b", "text": None}, "^a b$", ".. b$"),
        ({"input_ids": [1, 3, 4, 5], "labels": [-100, -100, 4, 5]}, "^abc", "..bc"),
        ({"input_ids": [3, 4, 5], "labels": [3, 4, 5]}, "abc", ".bc"),
        ({"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}, "abc", "..c"),
        (
            {"input_ids": [3, 4, 5, 6], "labels": [3, 4, -100, 6], "assistant_masks": [0, 0, 1, 1]},
            "abcd",
            "...d",
        ),
        (
            {
                "input_ids": [2, 2, 3, 4, 5, 2],
                "labels": [-100, -100, -100, 4, 5, 2],
                "attention_mask": [0, 0, 1, 1, 1, 0],
            },
            "abc",
            ".bc",
        ),
        (
            {"input_ids": [3, 4, 5, 6, 3, 4, 5, 6], "attention_mask": [1] * 8},
            "abcdabcd",
            ".bcdabcd",
        ),
        ({"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([-100, 4])}, "ab", ".b"),
    ],
)
def test_what_counts_of_a_record(record, says, counts, tokenizer):
    packed = pack([record], tokenizer, 8)
    assert written(packed, tokenizer) == [says] and shown(packed, tokenizer) == [counts]
    assert packed.num_documents == 1 and packed.num_tokens == len(says)


def test_padding_without_labels_is_no_text(tokenizer):
    packed = pack([{"input_ids": [3, 4, 2, 2], "attention_mask": [1, 1, 0, 0]}] * 4, tokenizer, 8)
    assert written(packed, tokenizer) == ["abababab"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("nulls", [False, True])
def test_the_assistants_turns_of_a_chat_count(template, nulls, tokenizer):
    tokenizer.chat_template = template
    extra = {"tool_calls": None} if nulls else {}  # as Arrow has it
    chat = [message | extra for message in CHAT]
    packed = pack([{"messages": chat, "tools": None}], tokenizer, 16)
    assert written(packed, tokenizer) == ["Xabécd$Xeéf$"]
    assert shown(packed, tokenizer) == ["....cd$...f$"]
    assert packed.tokens_per_byte == 5 / 3  # what ends a turn is no text


def test_a_prompt_of_messages_with_its_completion(tokenizer):
    tokenizer.chat_template = REWRITES
    packed = pack([{"prompt": CHAT[:3], "completion": CHAT[3:]}], tokenizer, 16)
    assert written(packed, tokenizer) == ["Xabécd$Xeé f$"]
    assert shown(packed, tokenizer) == [".......... f$"]
    with pytest.raises(
        ValueError, match=r"template must write the turns of document 0 .* one after"
    ):
        pack([{"messages": CHAT}], tokenizer, 16)
    assert shown(pack([{"messages": CHAT[:2]}], tokenizer, 8), tokenizer) == [".... cd$"]


def test_what_a_record_says_about_its_template_is_used(tokenizer):
    tokenizer.chat_template = PLAIN + "{% if loud %}{{ 'XX' }}{% endif %}{{ tools[0].name }}"
    record = {
        "messages": CHAT[:2],
        "tools": [{"name": "h"}],
        "chat_template_kwargs": {"loud": True},
    }
    with pytest.raises(ValueError, match="one after the other"):  # what comes last is no turn
        pack([record], tokenizer, 16)
    tokenizer.chat_template = "{% if loud %}{{ 'g' }}{% endif %}{{ tools[0].name }}" + PLAIN
    assert written(pack([record], tokenizer, 16), tokenizer) == ["ghXabécd$"]


def test_a_record_that_fits_is_not_cut_and_blocks_are_filled_up(tokenizer):
    records = [
        {"prompt": "a", "completion": "bc"},  # 5 tokens with BOS and EOS
        {"prompt": "dd", "completion": "e"},  # does not fit behind it
        {"prompt": "f", "completion": ""},  # nothing to learn
        {"prompt": "", "completion": "g"},  # fits
    ]
    packed = pack(records, tokenizer, 8)
    assert written(packed, tokenizer) == ["^abc$", "^dde$^g$"]
    assert shown(packed, tokenizer) == ["..bc$", "...e$.g$"]
    assert packed.lengths.tolist() == [5, 8] and packed.num_tokens == 13
    assert packed.labels(0).tolist()[5:] == [-100] * 3
    assert packed.num_documents == 3 and packed.tokens_per_byte == 7 / 4
    first = packed.opening(7).tolist()
    assert first == [*packed.blocks[0][:5].tolist(), *packed.blocks[1][:2].tolist()]
    assert len(packed.opening(99)) == 13


def test_texts_and_records_share_a_stream(tokenizer):
    documents = ["ab", {"prompt": "c", "completion": "d"}, {"prompt": "e", "completion": "f"}, "gh"]
    packed = pack(documents, tokenizer, 8)
    assert written(packed, tokenizer) == ["^ab$^cd$", "^ef$^gh$"]
    assert shown(packed, tokenizer) == [".ab$..d$", "..f$^gh$"]
    # The tail is text alone, and dropped; it would be filled up for a record.
    assert len(pack([*documents, "a"], tokenizer, 8)) == 2
    assert len(pack([*documents, documents[1]], tokenizer, 8)) == 3


def test_a_record_longer_than_a_block_is_cut_with_a_warning(tokenizer, caplog):
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "c" * 9, "completion": "defg"}]
    with caplog.at_level(logging.WARNING, logger="koff"):
        packed = pack(records, tokenizer, 4, name="fr")
    # The two blocks in which nothing but the prompt stands teach nothing.
    assert written(packed, tokenizer) == ["^ab$", "ccde", "fg$"]
    assert shown(packed, tokenizer) == ["..b$", "..de", ".g$"]
    assert "1 of 2 documents of fr are longer than a block of 4 tokens" in caplog.text


REFUSED = {
    "shifted": ({"input_ids": [3, 4], "labels": [4, 5]}, "got 4 where the token is 3 .position 0."),
    "short labels": ({"input_ids": [3, 4], "labels": [3]}, "labels .* got 1 for 2"),
    "short mask": ({"input_ids": [3], "attention_mask": []}, "attention_mask .* got 0 for 1"),
    "ids of -100": ({"input_ids": [-100] * 9}, "at least 0 and below 2.31, got -100; -100 belongs"),
    "huge id": ({"input_ids": [3, 2**40]}, "at least 0 and below 2.31, got 1099511627776"),
    "floats": (
        {"input_ids": [3.5]},
        "input_ids of document 1 of x must be a list of whole numbers",
    ),
    "bytes": ({"input_ids": b"12345678"}, "must be a list of whole numbers"),
    "float labels": ({"input_ids": [3], "labels": [3.0]}, "labels of document 1 .* whole numbers"),
    "null": ({"text": None}, r"got a record with \['text'\] and null in \['text'\]; write"),
    "null completion": ({"prompt": "a", "completion": None}, r"null in \['completion'\]"),
    "two kinds": (
        {"text": "a", "messages": CHAT},
        "of one kind, got both text and messages; leave",
    ),
    "preferences": (
        {"chosen": "a", "rejected": "b"},
        r"a record with \['chosen', 'rejected'\]; wr",
    ),
    "no text": ({"text": ["a"]}, "'text' of document 1 of x must be a text, got list"),
    "half chat": ({"prompt": "a", "completion": CHAT}, "'completion' of .* a text, got list"),
    "other half": ({"prompt": CHAT, "completion": "a"}, "completion of .* must be a list of mess"),
    "ShareGPT": (
        {"messages": [{"from": "human", "value": "a"}]},
        "must be a list of messages with 'role' and 'content', got",
    ),
    "no turn": ({"messages": CHAT[:1]}, r"a turn of the assistant, got the roles \['user'\]"),
    "no message": ({"messages": []}, "must be a list of messages"),
    "template": (
        {"messages": [{"role": "assistant"}]},
        "able to write document 1 .* UndefinedError",
    ),
    "surrogate": ({"prompt": "a", "completion": "\ud800"}, "must be valid Unicode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_records_that_contradict_themselves_are_refused(case, tokenizer):
    tokenizer.chat_template = PLAIN
    record, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=f"^pack: .*{message}"):
        pack(["abcdefgh", record], tokenizer, 4, name="x")


def test_labels_of_minus_100_alone_are_refused(tokenizer):
    record = {"input_ids": [3] * 20, "labels": [-100] * 20}
    with pytest.raises(ValueError, match="x must not be empty, got 2 without a token that counts"):
        pack([record] * 2, tokenizer, 4, name="x")
    assert pack([record, "abcd"], tokenizer, 4).num_documents == 1


def test_a_tokenizer_must_be_one_that_can_tell(tokenizer):
    with pytest.raises(TypeError, match=r"one of transformers, got 'gpt2'; load it with AutoTok"):
        pack(["abcd"], "gpt2", 4)
    with pytest.raises(
        ValueError, match="must have a chat template to read document 0 of x, got none"
    ):
        pack([{"messages": CHAT}], tokenizer, 4, name="x")
    with pytest.raises(TypeError, match="must hold token ids when there is no tokenizer"):
        pack([{"prompt": "a", "completion": "b"}], None, 4)
    with pytest.raises(ValueError, match="must have a chat template"):
        pack([{"messages": CHAT}], None, 4)


def test_a_slow_tokenizer_cannot_tell(tokenizer):
    slow = type("Slow", (), {"__call__": tokenizer.__call__, "is_fast": False})()
    with pytest.raises(
        TypeError, match="must be a fast one to tell which tokens of x count, got Slow"
    ):
        pack([{"prompt": "a", "completion": "b"}], slow, 4, name="x")
