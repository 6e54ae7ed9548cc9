"""From raw text to a tokenized dataset: ``python -m data_tools corpus|tokenizer|tokenize|chat|inspect``."""
