"""`loopfm compile`: will it fit, and what does it send, on devices that are not there.

The listing is the flow: `chips` (a name -> devices to compile for, and what they can do), `shapes`
(batches, without examples), `programs` (FM train, export, VM train, lowered from shapes alone),
`hlo` (collectives of a compiled program), `account` (bytes, roofline), `report` and `picture`,
`make`. Nothing is run and nothing is allocated: the compiler is the one that the devices' own
hosts use.
"""
