"""`loopfm bench`: rates of this package beside a peer's and the machine's limits, in one run.

The listing is the flow: `terms` and `rows` (what is measured), `data` (what both sides read),
`child` and `protocol` (each side is a process of its own), `worker` and `jobs` (our side of it),
`measure` (interleaved rounds), `flops` and `limits` (the denominators), `report` and `picture`,
`make`.
"""
