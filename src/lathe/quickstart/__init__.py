"""The whole journey in one command: text, tokenizer, training, a cut, healing, a stock checkpoint, a table."""
