"""From files, the Hub or the embedded corpus to the batches of a rank.

`splits` finds the rows (`pydocs`, `glue`, `files`, `hub` say from where), `tokenizers` and
`encoding` turn text into tokens, `packing` fills rows of a language model, `loader` deals them out.
"""
