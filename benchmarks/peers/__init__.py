"""The backbones in PyTorch, from the layers of the public FuxiCTR package.

    pip install -e '.[dev,peers]'      (without requirements.lock: its CUDA pins are not torch's)
    pytest -m peers
    loopfm bench --peer fuxictr        (--peer-python, for an environment with nothing but the peer)

`models.make(schema, config)` gives the twin of `loopfm_jax.backbones.build(config, schema)`, which
takes the same batches; `weights.copy` gives it the same weights. What they are for: numerical
parity (tests/test_peers.py), and a speed to compare with: `worker` answers `loopfm bench`, `jobs`
trains and serves the twins as FuxiCTR does.

Layers are FuxiCTR's own where its package has them: embeddings, first-order weights, inner
products, cross layers, DIN's attention, Dice, MLP. DIEN, DMR, DMIN and FmFM are not in the package;
theirs are written here from their definitions (PAPER section 5). The extra also installs
deepctr-torch, which belongs to the list of peers; no parity test uses it.
"""
