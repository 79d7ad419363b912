"""A tokenizer with one token per character."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per character: ids are easy to work out by hand."""
    vocabulary = {
        name: index for index, name in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh éX"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
