"""`loopfm scale`: throughput against model size, FM and VM, each size in a process of its own.

The listing is the flow: `dial` (a size -> widths), `plan` (what is measured), `sweep` (what was
done is kept), `worker` and `job` (a point as a process: does it fit, how fast is it), `law` (the
fitted power law), `report` and `picture`, `make`. Examples, counts of operations and the machine's
peak are those of `bench`; a point's MFU is over the peak of the run that measured it.
"""
