"""Checkpoints in the formats of others: recognised by their content, read as what they are, and written.

`table` lists the formats and finds that of a path; `opened` opens any of them as a `Checkpoint`; `described` gives tensors of a
file the meaning that a live model has for them; `writing` puts what is written in its place. Each further module is one
family of formats: how to recognise it, and, where no framework is needed for that, how to read it.
"""
