"""Documents in, blocks of tokens and losses out."""
