"""The data lane: source, table, kind of row, rows in Arrow, tokens in Arrow, batches of a rank.

`splits` reads the tables of a source (`files`, `streams`), `rows` decides what their rows are and
writes them, and `encoding` writes their tokens. `loader` and
`streams` distribute the rows to ranks and micro-batches.
"""
