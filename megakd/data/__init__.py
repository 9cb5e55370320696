"""The data pipeline, from files, the Hub or the embedded corpus to the batches of a rank.

`splits` loads the rows, with one file per source: `pydocs`, `glue`, `files`, `hub`. `tokenizers`
and `encoding` convert text into tokens. `packing` fills rows of causal language models. `loader`
distributes the rows to ranks and micro-batches.
"""
