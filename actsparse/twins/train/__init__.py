"""How the twins were made: prompts, sampling, tokenizer, training. See README.md."""
